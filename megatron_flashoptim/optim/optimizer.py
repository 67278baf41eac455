"""FlashOptimizer: a ``torch.optim.Optimizer`` whose parameters are shards of flat buckets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_flashoptim.codec import spec
from megatron_flashoptim.optim.capture import DeviceHyper
from megatron_flashoptim.optim.config import FlashOptimConfig
from megatron_flashoptim.optim.hyper import HyperRow, HyperTable
from megatron_flashoptim.optim.shard import BucketShard
from megatron_flashoptim.optim.step import step_

_Closure = Callable[[], float] | None


class FlashOptimizer(torch.optim.Optimizer):
    """An update rule over bucket shards: param groups have hyper-parameters, shards the state.

    The number of steps taken is the plain integer ``step`` of every param group, so that
    schedulers and checkpoints see what they see with a fused Adam. ``state`` stays empty: the
    state is flat per bucket, in ``shards``.

    Args:
        params: param groups as for ``torch.optim.AdamW``; keys of their own are kept.
        flash: update rule, formats and rounding.
        lr: default learning rate.
        weight_decay: default weight decay.
        options: what else the rule takes from a param group; see ``Rule.defaults``.
        capturable: keep learning rate and step number on the device, so that a step can be
            captured in a CUDA graph.

    Attributes:
        rule: the update rule.
        shards: bucket shards in the order in which they are stepped.
        table: hyper-parameters on the device; ``table.grad_scale`` scales the gradients.
        row_groups: for each row of the table, the index of its param group.
        defers_launches: ``step`` prepares the step and leaves each ``launch`` to the caller.
        steps_elsewhere: ``step`` does nothing; the caller calls ``begin_step`` and each ``launch``.
        before_launch: called with the index of each shard right before it is stepped, or None.

    Raises:
        ValueError: an option that the rule does not take.
    """

    def __init__(
        self,
        params: Sequence[dict[str, Any]],
        flash: FlashOptimConfig,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        capturable: bool = False,
        **options: Any,
    ) -> None:
        rule = flash.rule
        if unknown := options.keys() - rule.defaults.keys():
            raise ValueError(
                f"{rule.name} takes {', '.join(rule.defaults)}; got {', '.join(sorted(unknown))}"
            )
        defaults = {"lr": lr, **rule.defaults, **options, "weight_decay": weight_decay, "step": 0}
        super().__init__(list(params), defaults)
        self.flash = flash
        self.rule = rule
        self.shards: list[BucketShard] = []
        self.row_groups: list[int] = []
        self.table = HyperTable(0, "cpu")
        self.defers_launches = False
        self.steps_elsewhere = False
        self.before_launch: Callable[[int], None] | None = None
        self._rounding: spec.Rounding = "nearest"
        self._capturable = capturable
        self._offloaded = False
        self._device_hyper: DeviceHyper | None = None

    def attach(
        self,
        shards: Sequence[BucketShard],
        row_groups: Sequence[int],
        device: torch.device | str,
    ) -> None:
        """Hand over the shards, and the param group of each row their segments refer to.

        Raises:
            ValueError: a segment refers to a row that does not exist.
        """
        for shard in shards:
            for segment in shard.segments.segments:
                if not 0 <= segment.row < len(row_groups):
                    raise ValueError(f"segment row {segment.row} of {len(row_groups)} rows")
        self.shards = list(shards)
        self.row_groups = list(row_groups)
        self.table = HyperTable(len(self.row_groups), device)
        if self._capturable:
            self._device_hyper = DeviceHyper(self, self.rule, self.table, self.row_groups)

    def load_param_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        """Update each param group with the values given for it."""
        for group, values in zip(self.param_groups, groups, strict=True):
            lr = group["lr"]
            group.update(values)
            if isinstance(lr, torch.Tensor) and "lr" in values:
                group["lr"] = lr.fill_(float(values["lr"]))
        if self._device_hyper is not None:
            self._device_hyper.load()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load param groups, which is all that ``state_dict`` holds.

        Raises:
            ValueError: there are more groups, or fewer.
        """
        # Not torch's, which puts new tensors in the place of those that a CUDA graph reads.
        groups = state_dict["param_groups"]
        self.load_param_groups([{k: group[k] for k in group if k != "params"} for group in groups])

    def plain_param_groups(self) -> list[dict[str, Any]]:
        """Return the param groups as plain values, without parameters, for a checkpoint."""
        if self._device_hyper is not None:
            self._device_hyper.store()
        return [
            {
                key: value.item() if isinstance(value, torch.Tensor) else value
                for key, value in group.items()
                if key != "params"
            }
            for group in self.param_groups
        ]

    @torch.no_grad()
    def step(self, closure: _Closure = None) -> None:  # type: ignore[override]  # returns no loss
        """Step every shard once, one launch per bucket.

        Raises:
            ValueError: a closure is given; gradients are ready when Megatron steps.
            RuntimeError: the state is offloaded.
        """
        if closure is not None:
            raise ValueError("FlashOptimizer.step takes no closure")
        if self.steps_elsewhere:
            return
        self.begin_step()
        if not self.defers_launches:
            for index in range(len(self.shards)):
                self.launch(index)

    @torch.no_grad()
    def begin_step(self) -> None:
        """Count a step and fill the table of hyper-parameters for its launches.

        Raises:
            RuntimeError: the state is offloaded.
        """
        self.check_not_offloaded()
        if self._device_hyper is not None:
            self._device_hyper.advance(self.flash.seed)
        else:
            for group in self.param_groups:
                group["step"] += 1
            rows = [HyperRow.of(self.rule, self.param_groups[index]) for index in self.row_groups]
            self.table.fill(rows, seed=self.flash.seed)
        self._rounding = self.exp_avg_sq_rounding()

    def exp_avg_sq_rounding(self) -> spec.Rounding:
        """Return how second moments are rounded: by the largest beta2 of all param groups.

        Ranks own parts of different groups and have all of them, so that every rank rounds alike.
        """
        if not self.rule.keeps_exp_avg_sq:
            return "nearest"
        return self.flash.resolve_rounding(max(group["betas"][1] for group in self.param_groups))

    @torch.no_grad()
    def launch(self, index: int) -> None:
        """Step one shard by the hyper-parameters of the last ``begin_step``."""
        if self.before_launch is not None:
            self.before_launch(index)
        step_(
            self.shards[index],
            self.table,
            exp_avg_sq_rounding=self._rounding,
            master_rounding=self.flash.master_rounding,
        )

    def check_not_offloaded(self) -> None:
        """Refuse a step whose state is elsewhere.

        Raises:
            RuntimeError: ``offload()`` was called and ``restore()`` was not.
        """
        if self._offloaded:
            raise RuntimeError(
                "the state of the flash optimizer is offloaded to the CPU; call "
                "optimizer.restore_from_cpu() before optimizer.step()"
            )

    def offload(self) -> None:
        """Move the state of all shards to the CPU; views of weights and gradients stay.

        No step can be taken until ``restore()``.
        """
        for shard in self.shards:
            shard.move_state("cpu")
        self._offloaded = True

    def restore(self) -> None:
        """Move the state back beside the gradients."""
        for shard in self.shards:
            shard.move_state(shard.grad.device)
        self._offloaded = False

    def nbytes(self) -> int:
        """Return the bytes of optimizer state and tables on this rank."""
        return sum(shard.nbytes() for shard in self.shards) + self.table.nbytes()
