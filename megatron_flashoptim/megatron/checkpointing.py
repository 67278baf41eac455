"""FlashCheckpointing: how a flash distributed optimizer saves and loads, in each format.

``torch_dist`` checkpoints map the state into Megatron's sharded state dict, as flat buckets
(``dp_reshardable``) or in the parameters' shapes (``fully_reshardable``). The legacy ``torch``
format goes through the base class, which gathers and scatters fp32 tensors; decoding and encoding
them is the identity on the state.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.utils import log_single_rank

from megatron_flashoptim.checkpoint import loading, param_groups
from megatron_flashoptim.checkpoint import metadata as flash_metadata
from megatron_flashoptim.checkpoint.bucket_space import BucketSpace
from megatron_flashoptim.checkpoint.conversion import (
    SCALE_OF,
    decode_moment,
    encode_moment,
    split_beside,
)
from megatron_flashoptim.checkpoint.model_space import ModelSpace, OwnedRange
from megatron_flashoptim.checkpoint.pieces import Piece, pieces_of
from megatron_flashoptim.checkpoint.stock import StockRange, ranges_of_buckets, ranges_of_model
from megatron_flashoptim.checkpoint.together import on_all_ranks
from megatron_flashoptim.codec import join_master, split_master
from megatron_flashoptim.codec.spec import GROUP_SIZE
from megatron_flashoptim.megatron.grad_stats import ShardParam
from megatron_flashoptim.optim import BucketShard, FlashOptimConfig, FlashOptimizer

if TYPE_CHECKING:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer as _Base
else:
    _Base = object

logger = logging.getLogger(__name__)

# Megatron's name of the master weight in the legacy format.
_PARAM = "param"


class FlashCheckpointing(_Base):
    """Checkpoint methods of ``FlashDistributedOptimizer``, in front of Megatron's own.

    Attributes:
        flash: the configuration in force.
        shard_params: where each owned parameter lies in the shards.
        run_schedules: of the param groups, before they were loaded; see ``settle_schedule``.
    """

    flash: FlashOptimConfig
    optimizer: FlashOptimizer
    shard_params: list[ShardParam]
    run_schedules: list[dict[str, Any]] | None = None

    def weights_dtype(self) -> str:
        """Return the dtype of the model weights, as checkpoint metadata names it."""
        return flash_metadata.BFLOAT16 if self.config.bf16 else flash_metadata.FLOAT32

    def state_dict(self) -> dict[str, Any]:
        """Return param groups (without parameters), rounding seed and grad scaler state."""
        if self.is_stub_optimizer:
            return {}
        state: dict[str, Any] = {
            "optimizer": {"param_groups": self.optimizer.plain_param_groups()},
            flash_metadata.KEY: flash_metadata.describe(self.flash, self.weights_dtype()),
        }
        if self.grad_scaler:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load param groups, matched by Megatron's identifier keys, and the parameter state.

        Raises:
            ValueError: the checkpoint is of another optimizer or format, of another form of the
                update rule, or has other groups.
        """
        if self.is_stub_optimizer:
            return
        saved_format = state_dict.get(flash_metadata.KEY)
        flash_metadata.check(saved_format, self.flash, self.weights_dtype())
        matched = self._matching_groups(state_dict["optimizer"]["param_groups"])
        if taken_over := flash_metadata.taken_over(state_dict[flash_metadata.KEY], self.flash):
            log_single_rank(logger, logging.WARNING, taken_over)
        self.optimizer.load_param_groups(
            [
                {key: value for key, value in group.items() if key not in param_groups.OWN}
                for group in matched
            ]
        )
        self.flash = flash_metadata.with_saved_seed(self.flash, state_dict[flash_metadata.KEY])
        self.optimizer.flash = self.flash
        if self.grad_scaler and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        if "param_state" in state_dict:
            loading.finish(state_dict["param_state"])

    def _matching_groups(self, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the checkpoint's group for each of the run's; tells what it changes in them."""
        current = self.optimizer.param_groups
        matched = param_groups.match(current, saved)
        self.run_schedules = param_groups.schedules(current)
        for line in param_groups.taken_over(current, matched, self.flash.rule.defaults):
            _warn_once(line)
        return matched

    def settle_schedule(self, *, override: bool, use_checkpoint: bool) -> None:
        """Choose between the run's and the loaded learning rates of the param groups.

        Args:
            override: the run's, ``--override-opt_param-scheduler``.
            use_checkpoint: the checkpoint's, ``--use-checkpoint-opt_param-scheduler``.

        Raises:
            ValueError: they differ, and neither was chosen.
        """
        run, groups = self.run_schedules, self.optimizer.param_groups
        self.run_schedules = None
        if run is None or use_checkpoint:
            return
        for line in param_groups.other_schedules(run, groups):
            if not override:
                raise ValueError(
                    f"{line}: give --override-opt_param-scheduler for this run's, or "
                    "--use-checkpoint-opt_param-scheduler for the checkpoint's"
                )
            _warn_once(f"{line}: this run's is used")
        for group, ours in zip(groups, run, strict=True):
            for key in param_groups.SCHEDULE:
                group.pop(key, None)
            group.update(ours)

    def load_stock_param_groups(self, saved: list[dict[str, Any]], args: object) -> None:
        """Load step, learning rate and the like from param groups of Megatron's Adam.

        Args:
            saved: the checkpoint's.
            args: the arguments in it, or None; for what the log says.

        Raises:
            ValueError: the checkpoint has other groups.
        """
        found = []
        matched = self._matching_groups(saved)
        decoupled = param_groups.decoupled_by_adam(matched, args)
        if taken_over := flash_metadata.taken_over_from_adam(decoupled, self.flash):
            _warn_once(taken_over)
        for own, stock in zip(self.optimizer.param_groups, matched, strict=True):
            values = {key: stock[key] for key in own if key in stock and key != "params"}
            # torch's AdamW counts in floats, and Transformer Engine's keeps none before it steps.
            values["step"] = int(stock.get("step") or 0)
            found.append(values)
        self.optimizer.load_param_groups(found)

    def stock_ranges(
        self, sharding_type: str, model_sharded_state_dict: Any, prefix: str
    ) -> list[StockRange]:
        """Return where a checkpoint of Megatron's Adam has this rank's state.

        Args:
            sharding_type: the checkpoint's.
            model_sharded_state_dict: the model's, for model space.
            prefix: what Megatron's chain puts in front of keys in bucket space.
        """
        if sharding_type == flash_metadata.DP_RESHARDABLE:
            owned = (
                (self._param_name(item.param), item.shard, item.start, item.end)
                for item in self.shard_params
            )
            return ranges_of_buckets(self.bucket_space(), owned, prefix)
        return ranges_of_model(
            self.model_space(model_sharded_state_dict),
            older=sharding_type == flash_metadata.FULLY_SHARDED_MODEL_SPACE,
        )

    def stock_groups(self, prefix: str) -> ShardedObject:
        """Return what reads the param groups of Megatron's Adam in ``dp_reshardable``."""
        index = self.data_parallel_group_idx
        replica = (self.distributed_optimizer_instance_id, 0, self.data_parallel_group.rank())
        key = f"{prefix}optimizer.distributed.dp_group_idx_{index}.optimizer"
        return ShardedObject(key, None, (1,), (0,), replica_id=replica)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return Megatron's sharded state dict with our parameter state in it.

        Raises:
            ValueError: a sharding type that is not supported.
        """
        flash_metadata.check_sharding_type(kwargs.get("metadata"))
        return {} if self.is_stub_optimizer else super().sharded_state_dict(*args, **kwargs)

    def bucket_space(self) -> BucketSpace:
        """Return this rank's buckets as a checkpoint sees them."""
        return BucketSpace(
            self.buffers,
            self.optimizer.shards,
            dp_rank=self.data_parallel_group.rank(),
            dp_group_index=self.data_parallel_group_idx,
            instance=self.distributed_optimizer_instance_id,
        )

    def sharded_param_state_dp_reshardable(
        self,
        model_sharded_state_dict: Any,
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> Any:
        """Return the flat bucket tensors as sharded tensors, see ``checkpoint.bucket_space``."""
        space = self.bucket_space()
        if not is_loading:
            return space.saving()
        return space.loading(_format(metadata)["master_bits"])

    def model_space(self, model_sharded_state_dict: Any) -> ModelSpace:
        """Return this rank's state as a checkpoint in the parameters' shapes sees it.

        Raises:
            ValueError: a parameter is not in the model's sharded state dict, or is mapped into
                it by more than cutting.
        """
        pieces = self._pieces(model_sharded_state_dict)
        ranges = []
        for item in self.shard_params:
            ranges.append(
                OwnedRange(
                    pieces=pieces(item.param),
                    shape=tuple(item.param.shape),
                    param_start=item.param_start,
                    shard=self.optimizer.shards[item.shard],
                    start=item.start,
                    end=item.end,
                )
            )
        return ModelSpace(ranges, self.distributed_optimizer_instance_id)

    def weights_of_keys(self, model_sharded_state_dict: Any) -> set[tuple[str, str]]:
        """Return model keys, each with the dtype of its weights; equal on data-parallel ranks.

        Raises:
            ValueError: as of ``model_space``.
        """
        pieces = self._pieces(model_sharded_state_dict)
        return {
            (piece.key, str(param.dtype).removeprefix("torch."))
            for buffer in self.buffers
            for param in buffer.params
            for piece in pieces(param)
        }

    def _pieces(self, model_sharded_state_dict: Any) -> Callable[[torch.nn.Parameter], list[Piece]]:
        """Return what finds the pieces of a parameter, see ``checkpoint.pieces``."""
        sharded, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
        sharded_of = {id(base.data): base for base in nested_values(sharded)}

        def of(param: torch.nn.Parameter) -> list[Piece]:
            base = sharded_of.get(id(param))
            if base is None:
                raise ValueError(
                    f"parameter {self._param_name(param)} is not in the model's sharded state "
                    "dict; build it with keep_vars=True, as Megatron does"
                )
            return pieces_of(base, tuple(param.shape))

        return of

    def sharded_param_state_fully_reshardable(
        self,
        model_sharded_state_dict: Any,
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> Any:
        """Return this rank's boxes of each parameter's state, see ``checkpoint.model_space``."""
        described = _format(metadata)
        space = self.model_space(model_sharded_state_dict)
        per_element = frozenset(described[flash_metadata.PER_ELEMENT_SCALES])
        quantized = frozenset(described.get(flash_metadata.QUANTIZED_WEIGHTS, ()))
        if not is_loading:
            return space.saving(per_element, quantized)
        return space.loading(per_element, described["master_bits"], quantized)

    def get_parameter_state_dp_zero(self, *args: Any, **kwargs: Any) -> Any:
        """Return fp32 masters and moments of all ranks on the first one, for the legacy format."""
        if self.is_stub_optimizer:
            return None
        found = super().get_parameter_state_dp_zero(*args, **kwargs)
        for tensors in _of_buffers(found or {}):
            for moment in self._moments_of_adam_alone():
                del tensors[moment]
        return found

    def _moments_of_adam_alone(self) -> list[str]:
        """Return the moments that Megatron gathers and scatters, and this update rule lacks."""
        return [moment for moment in SCALE_OF if moment not in self.flash.rule.moments]

    def load_parameter_state_from_dp_zero(
        self, state_dict: dict[Any, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Encode fp32 masters and moments that the first rank has read from the legacy format.

        A collective of all ranks.

        Raises:
            ValueError: DDP's buffers have other dtypes than those of the checkpoint; on all ranks.
        """
        if self.is_stub_optimizer:
            return

        def check_and_fill() -> None:
            if self.data_parallel_group.rank() != 0:
                return
            _check_buffers(state_dict, self.gbuf_ranges)
            for tensors in _of_buffers(state_dict):
                zeros = torch.zeros(1).expand_as(tensors[_PARAM])
                tensors.update(dict.fromkeys(self._moments_of_adam_alone(), zeros))

        on_all_ranks(check_and_fill)
        super().load_parameter_state_from_dp_zero(state_dict, *args, **kwargs)

    @torch.no_grad()
    def _get_main_param_and_optimizer_states(
        self, model_param: torch.nn.Parameter
    ) -> dict[str, torch.Tensor]:
        """Return this rank's range of a parameter's master and moments in fp32.

        Moments that the update rule lacks are zero: Megatron asks for both of Adam's.
        """
        item, shard = self._located(model_param)
        elements = slice(item.start, item.end)
        param = shard.param[elements]
        correction = None if shard.correction is None else shard.correction[elements]
        bf16 = param.dtype == torch.bfloat16
        tensors = {_PARAM: join_master(param, correction) if bf16 else param.clone()}
        state = dict(shard.state())
        for moment, scale in SCALE_OF.items():
            if moment in state:
                tensors[moment] = decode_moment(
                    moment,
                    state[moment][elements],
                    state[scale][_groups(item)],
                    code=shard.exp_avg_sq_code,
                )
            else:
                tensors[moment] = torch.zeros(1).expand(item.end - item.start)
        return tensors

    @torch.no_grad()
    def _set_main_param_and_optimizer_states(
        self, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]
    ) -> None:
        """Split and encode this rank's range of a parameter's master and moments."""
        item, shard = self._located(model_param)
        elements = slice(item.start, item.end)
        device = shard.param.device
        master = tensors[_PARAM].to(device=device, dtype=torch.float32)
        if shard.correction is None:
            shard.param[elements].copy_(master)
        else:
            # The model's weights are loaded before the optimizer, on every rank alike.
            high, correction = split_beside(master, shard.param[elements], bits=shard.master_bits)
            shard.param[elements].copy_(high)
            shard.correction[elements].copy_(correction)
        state = dict(shard.state())
        for moment, scale in SCALE_OF.items():
            if moment in state:
                codes, scales = encode_moment(
                    moment, tensors[moment].to(device), code=shard.exp_avg_sq_code
                )
                state[moment][elements].copy_(codes)
                state[scale][_groups(item)].copy_(scales)

    def _set_master(self, item: ShardParam, master: torch.Tensor) -> None:
        """Put an fp32 master into weight and correction."""
        shard = self.optimizer.shards[item.shard]
        elements = slice(item.start, item.end)
        if shard.correction is None:
            shard.param[elements].copy_(master)
            return
        high, correction = split_master(master, bits=shard.master_bits)
        assert correction is not None
        shard.param[elements].copy_(high)
        shard.correction[elements].copy_(correction)

    def _located(self, param: torch.nn.Parameter) -> tuple[ShardParam, BucketShard]:
        if self._item_of is None:
            self._item_of = {id(item.param): item for item in self.shard_params}
        item = self._item_of[id(param)]
        return item, self.optimizer.shards[item.shard]

    _item_of: dict[int, ShardParam] | None = None


@functools.cache
def _warn_once(line: str) -> None:
    """Log a line that dense and expert parameters, which have an optimizer each, share."""
    log_single_rank(logger, logging.WARNING, line)


def begin_load() -> None:
    """Let the next load say again what one before has said."""
    _warn_once.cache_clear()


def _of_buffers(state: dict[Any, Any]) -> list[dict[str, Any]]:
    """Return the tensors by name of each buffer of the legacy format."""
    numbers = [number for number in state if isinstance(number, int)]
    return [tensors for number in numbers for tensors in state[number].values()]


def _check_buffers(saved: dict[Any, Any], ranges: list[dict[Any, Any]]) -> None:
    """Refuse a legacy checkpoint of buffers of other dtypes, which it keeps the state apart by."""
    theirs = [sorted(map(str, saved[n])) for n in sorted(n for n in saved if isinstance(n, int))]
    ours = [sorted(map(str, maps)) for maps in ranges]
    if theirs != ours:
        raise ValueError(
            f"the checkpoint was saved with buffers of (weight, gradient) dtypes {theirs}, this "
            f"run has {ours}: the legacy format (--ckpt-format torch) needs the same, so keep the "
            "same parameters in fp32 and --grad-reduce-in-bf16 as in the run that saved it"
        )


def _groups(item: ShardParam) -> slice:
    return slice(item.start // GROUP_SIZE, -(-item.end // GROUP_SIZE))


def _format(content: dict[str, Any] | None) -> dict[str, Any]:
    """Return the description of the flash state, which the chain puts into the metadata.

    Raises:
        ValueError: there is none.
    """
    described = (content or {}).get(flash_metadata.KEY)
    if not isinstance(described, dict):
        raise ValueError(
            "flash optimizer state is saved and loaded through the optimizer that "
            "get_megatron_optimizer returned, which describes it in the checkpoint's metadata"
        )
    return described
