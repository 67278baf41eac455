"""ChainedCheckpointing: how a chain of flash optimizers saves and loads what its members have.

What ranks must agree on is settled here: the description of the state in a checkpoint, and errors,
which are raised on all ranks, whichever found them.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
from megatron.core.utils import log_single_rank

from megatron_flashoptim.checkpoint import metadata, param_groups
from megatron_flashoptim.checkpoint.deviation import Report
from megatron_flashoptim.checkpoint.stock import StockLoading, StockRange
from megatron_flashoptim.checkpoint.together import gathered, on_all_ranks
from megatron_flashoptim.megatron.checkpointing import begin_load
from megatron_flashoptim.megatron.distrib_optimizer import FlashDistributedOptimizer
from megatron_flashoptim.megatron.release.gradient_release import GradientRelease

if TYPE_CHECKING:
    from megatron.core.optimizer.optimizer import ChainedOptimizer as _Base
else:
    _Base = object

logger = logging.getLogger(__name__)

_PARAM_STATE = "param_state"
# State of Megatron's own Adam that is being loaded, and its param groups in dp_reshardable.
_STOCK = "flashoptim_stock"
_STOCK_GROUPS = "flashoptim_stock_groups"


class ChainedCheckpointing(_Base):
    """Checkpoint methods of ``FlashChainedOptimizer``, in front of Megatron's own.

    Attributes:
        release: see ``FlashChainedOptimizer``.
    """

    chained_optimizers: list[FlashDistributedOptimizer]
    release: GradientRelease | None

    def __init__(self, chained_optimizers: list[FlashDistributedOptimizer]) -> None:
        super().__init__(chained_optimizers)
        # By sharding type, what all ranks together know of what is to be saved.
        self._agreed: dict[str, dict[str, Any]] = {}
        # Whether weights are to be made of the high parts that a checkpoint has beside them.
        self._loads_quantized = False

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any
    ) -> Any:
        """Return the members' sharded state dicts; describe the format, or check it on load.

        A collective of all ranks. Megatron stores the very ``metadata`` dict it passes here as the
        checkpoint's content metadata, and passes that of the checkpoint on load.

        Raises:
            ValueError: an unsupported sharding type, or, on load, state of another optimizer,
                format or bucket layout; on all ranks, whichever found it, as all errors are.
            RuntimeError: with gradient release, on save, the last update is half applied.
        """
        if is_loading and self.release is not None:
            self.release.wait()  # the checkpoint is read into this very state
        if not is_loading:
            self._gather_pending()
            self.check_can_be_saved(model_sharded_state_dict, kwargs.get("metadata"))
        return on_all_ranks(
            lambda: self._sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs)
        )

    def check_can_be_saved(
        self, model_sharded_state_dict: Any, content: dict[str, Any] | None
    ) -> None:
        """Refuse a model whose state a sharding type cannot hold; looked into once.

        A collective of all ranks.

        Args:
            model_sharded_state_dict: the model's, or anything that has the values of it.
            content: content metadata of the checkpoint to be saved.

        Raises:
            ValueError: with ``fully_reshardable``, a tensor's state would be incomplete, or its
                weights have several dtypes; on all ranks.
        """
        members = [m for m in self.chained_optimizers if not m.is_stub_optimizer]
        sharding_type = (content or {}).get(metadata.SHARDING_TYPE)
        if not members or sharding_type in self._agreed:
            return
        if sharding_type == metadata.FULLY_RESHARDABLE:
            self._agreed[sharding_type] = self._agree(members, model_sharded_state_dict)
        elif sharding_type == metadata.DP_RESHARDABLE:
            ranks = gathered(on_all_ranks(lambda: _buckets(members)))
            digests, described = zip(*ranks, strict=True)
            self._agreed[sharding_type] = described[0] | metadata.describe_bucket_groups(digests)

    def _sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool, **kwargs: Any
    ) -> Any:
        """Do what ``sharded_state_dict`` does on this rank."""
        if not is_loading:
            self._check_update_is_whole()
        content = kwargs.get("metadata")
        if is_loading and metadata.KEY not in (content or {}):
            for member in self.chained_optimizers:
                metadata.check_stock(content, member.flash)
            return self._stock_state_dict(content or {}, model_sharded_state_dict)
        metadata.check_sharding_type(content)
        members = [m for m in self.chained_optimizers if not m.is_stub_optimizer]
        if is_loading and content is not None:  # the same on all ranks
            self._loads_quantized = metadata.QUANTIZED_WEIGHTS in content[metadata.KEY] or any(
                chunk.ddp_config.fp8_param_gather for chunk in self.model_chunks
            )
        if members:
            assert content is not None  # it has a sharding type
            if is_loading:
                self._check(content, members, model_sharded_state_dict)
            else:
                content[metadata.KEY] = self._describe(content, members)
        if (
            content is None
            or not members
            or content[metadata.SHARDING_TYPE] == metadata.DP_RESHARDABLE
        ):
            return super().sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs)
        return _merged(
            [m.sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs) for m in members]
        )

    def _synchronize_steps(self) -> Any:
        """Align the step counts of all param groups, as Megatron does, but for stubs.

        Megatron would look for those of a stub, which has none (seen in 0.17.1 to 0.19.2).
        """
        members = self.chained_optimizers
        self.chained_optimizers = [m for m in members if not m.is_stub_optimizer]
        try:
            return super()._synchronize_steps()
        finally:
            self.chained_optimizers = members

    def state_dict(self) -> Any:
        """Return the members' state dicts, as Megatron does.

        Raises:
            RuntimeError: with gradient release, the last update is half applied.
        """
        self._check_update_is_whole()
        return super().state_dict()

    def _check_update_is_whole(self) -> None:
        problem = None if self.release is None else self.release.partial_step()
        if problem is not None:
            raise RuntimeError(f"{problem} It is not saved.")

    def load_state_dict(self, state_dict: Any) -> None:
        """Load what ``sharded_state_dict`` or ``state_dict`` of such a chain became.

        A collective of all ranks.

        Raises:
            ValueError: the state is of another optimizer or format, has other param groups, lacks
                tensors, or, in the legacy format, is that of another number of optimizers; on all
                ranks, whichever found it, as all errors are.
        """
        begin_load()
        if self.release is not None:
            self.release.forget()
        if isinstance(state_dict, dict) and _STOCK in state_dict:
            self._load_stock(state_dict)
            return
        on_all_ranks(lambda: self._load_members(state_dict))
        if self._loads_quantized:
            self._gather_weights()

    def settle_schedule(self, *, override: bool, use_checkpoint: bool) -> None:
        """Choose the learning rates of param groups that were loaded, see each member's."""
        for member in self.chained_optimizers:
            if not member.is_stub_optimizer:
                member.settle_schedule(override=override, use_checkpoint=use_checkpoint)

    def _load_members(self, state_dict: Any) -> None:
        own = len(self.chained_optimizers)
        saved = len(state_dict) if isinstance(state_dict, list) else own
        if "optimizer" in state_dict and metadata.MERGED not in state_dict:
            saved = 1
        if saved != own:
            raise ValueError(
                f"the checkpoint holds the state of {saved} optimizers, this run has {own}: one "
                "more with --expert-model-parallel-size above 1, and with "
                "--overlap-param-gather-with-optimizer-step; give both as in the run that saved it"
            )
        if not isinstance(state_dict, dict) or metadata.MERGED not in state_dict:
            super().load_state_dict(state_dict)
            return
        members = [m for m in self.chained_optimizers if not m.is_stub_optimizer]
        for number, member in enumerate(members):
            param_state = state_dict[_PARAM_STATE][str(number)]
            member.load_state_dict({**state_dict, _PARAM_STATE: param_state})

    def _stock_state_dict(
        self, content: dict[str, Any], model_sharded_state_dict: Any
    ) -> dict[str, Any]:
        """Return what loads Megatron's Adam: param groups now, tensors after the weights."""
        sharding_type = content[metadata.SHARDING_TYPE]
        in_buckets = sharding_type == metadata.DP_RESHARDABLE
        ranges: list[StockRange] = []
        groups: dict[str, Any] = {}
        for number, member in enumerate(self.chained_optimizers):
            if member.is_stub_optimizer:
                continue
            prefix = f"chained_{number}." if len(self.chained_optimizers) > 1 else ""
            ranges += member.stock_ranges(sharding_type, model_sharded_state_dict, prefix)
            if in_buckets:
                groups[str(number)] = member.stock_groups(prefix)
        return {_STOCK: LocalNonpersistentObject(StockLoading(ranges)), _STOCK_GROUPS: groups}

    def _load_stock(self, state_dict: dict[Any, Any]) -> None:
        """Convert the state of Megatron's Adam, a collective of all ranks.

        Raises:
            ValueError: param groups differ, state is missing, or it does not belong to the
                weights; or it is flash state. On all ranks, whichever found it.
        """
        if metadata.KEY in state_dict:  # in fully_reshardable
            raise ValueError(
                "the checkpoint holds flash optimizer state, and sharded_state_dict(..., "
                "is_loading=True, metadata=...) was given metadata that does not say so. Give it "
                "that of dist_checkpointing.load_content_metadata(folder); what was saved without "
                "content_metadata=... has none"
            )
        local = on_all_ranks(lambda: self._convert_stock(state_dict))
        report = Report()
        for rank in gathered(local):
            report.add(rank)
        report.check()
        # Shown at Megatron's default level: this happens once, and is not without loss.
        log_single_rank(logger, logging.WARNING, report.text())
        self._gather_weights()

    def _convert_stock(self, state_dict: dict[Any, Any]) -> Report:
        """Convert this rank's state of Megatron's Adam."""
        shared = param_groups.of_optimizer(state_dict)
        args = state_dict[_STOCK].saved_args()
        for number, member in enumerate(self.chained_optimizers):
            if not member.is_stub_optimizer:
                own = state_dict.get(_STOCK_GROUPS, {}).get(str(number))
                saved = own["param_groups"] if own else shared
                member.load_stock_param_groups(saved, args)
                member.read_high_parts(member.optimizer.shards)  # of the weights just loaded
        report: Report = state_dict[_STOCK].convert()
        return report

    def _check(
        self,
        content: dict[str, Any],
        members: list[FlashDistributedOptimizer],
        model_sharded_state_dict: Any,
    ) -> None:
        saved = content[metadata.KEY]
        metadata.check(saved, members[0].flash, members[0].weights_dtype())
        if content[metadata.SHARDING_TYPE] == metadata.DP_RESHARDABLE:
            metadata.check_buckets(saved, [m.bucket_space() for m in members])
            return
        for member in members:
            metadata.check_weights(saved, member.weights_of_keys(model_sharded_state_dict))

    def _describe(
        self, content: dict[str, Any], members: list[FlashDistributedOptimizer]
    ) -> dict[str, Any]:
        """Return the description of the state to save, the same on all ranks.

        Megatron saves that of rank 0, and warns on each rank that has another.
        """
        described = metadata.describe(members[0].flash, members[0].weights_dtype())
        return described | self._agreed[content[metadata.SHARDING_TYPE]]

    def _agree(
        self, members: list[FlashDistributedOptimizer], model_sharded_state_dict: Any
    ) -> dict[str, Any]:
        """Return what any rank says of keys in model space, a collective of all ranks."""

        def of_this_rank() -> list[Any]:
            local = []
            for member in members:
                space = member.model_space(model_sharded_state_dict)
                dtypes = member.weights_of_keys(model_sharded_state_dict)
                whole = space.keys_with_broken_groups(), space.quantized_keys()
                local.append((*whole, space.covered(), dtypes))
            return local

        local = on_all_ranks(of_this_rank)
        described = [member for rank in gathered(local) for member in rank]
        broken, quantized, covered, dtypes_of_keys = zip(*described, strict=True)
        metadata.check_covered(covered)
        fp32 = metadata.fp32_keys(set().union(*dtypes_of_keys))
        in_bf16 = members[0].weights_dtype() == metadata.BFLOAT16
        return metadata.describe_groups(
            set().union(*broken), fp32 if in_bf16 else (), set().union(*quantized)
        )

    @torch.no_grad()
    def _gather_pending(self) -> None:
        """Gather the weights that ``--overlap-param-gather`` leaves to the next forward pass.

        They are the high parts of the masters: a checkpoint of weights of before the last step
        beside corrections of after it would hold neither's masters. Megatron's training loop has
        gathered them before it saves.
        """
        for chunk in self.model_chunks:
            if not chunk.ddp_config.overlap_param_gather:
                continue
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                if group.param_gather_handle is not None or not group.param_gather_dispatched:
                    group.start_param_sync(force_sync=True)

    def _gather_weights(self) -> None:
        """Let all ranks have the weights that each has changed its own part of."""
        for member in self.chained_optimizers:
            member._copy_main_params_to_model_params()
        for chunk in self.model_chunks:
            chunk.start_param_sync(force_sync=True)


def _buckets(
    members: list[FlashDistributedOptimizer],
) -> tuple[list[tuple[int, int]], dict[str, Any]]:
    """Return what stands for the buckets of this rank, and on rank 0 their description."""
    spaces = [member.bucket_space() for member in members]
    is_first = torch.distributed.get_rank() == 0
    described = metadata.describe_buckets(spaces, members[0].weights_dtype()) if is_first else {}
    return metadata.bucket_digests(spaces), described


def _merged(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the state dicts of a chain's members as one, parameter state side by side."""
    groups = [group for state in states for group in state["optimizer"]["param_groups"]]
    return {
        **states[0],
        metadata.MERGED: True,
        "optimizer": {"param_groups": groups},
        _PARAM_STATE: {str(number): state[_PARAM_STATE] for number, state in enumerate(states)},
    }
