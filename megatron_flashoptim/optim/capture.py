"""DeviceHyper: the hyper-parameters of a step computed on the device, for CUDA graphs.

A captured step runs no Python. What changes from step to step is then read from device memory: the
step number, which the captured step itself counts, and the learning rate, which a scheduler fills
in. The rest of a param group is fixed when the step is captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_flashoptim.codec import rounding, spec
from megatron_flashoptim.kernels import columns
from megatron_flashoptim.optim.hyper import HyperTable
from megatron_flashoptim.optim.rules import Rule


class DeviceHyper:
    """Fills a hyper-parameter table without the host.

    ``lr`` of every param group becomes an fp64 scalar tensor on the device, which Megatron's
    scheduler fills in place. Weight decay and the rule's own options are taken from the param
    groups at each step that is not captured; a captured one keeps those of the step before it.

    Args:
        optimizer: its param groups have ``lr``, ``step`` and what the rule takes.
        rule: the update rule.
        table: the table, of one row per entry of ``row_groups``.
        row_groups: for each row, the index of its param group.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rule: Rule,
        table: HyperTable,
        row_groups: Sequence[int],
    ) -> None:
        self._optimizer = optimizer
        self._rule = rule
        self._options = ("weight_decay", *rule.defaults)
        self._table = table
        device = table.keys.device
        self._row_groups = torch.tensor(row_groups, dtype=torch.int64, device=device)
        groups = len(optimizer.param_groups)
        self._step = torch.zeros(groups, dtype=torch.int64, device=device)
        # The options of each param group, tuples spread out.
        self._constants = torch.zeros(groups, 0, dtype=torch.float64, device=device)
        self._known: list[tuple[float, ...]] = []
        self.load()

    def load(self) -> None:
        """Take over what the param groups say, after they were made or loaded."""
        steps = [group["step"] for group in self._optimizer.param_groups]
        self._step.copy_(torch.tensor(steps, dtype=torch.int64))
        self._refresh()

    def _refresh(self) -> None:
        for group in self._optimizer.param_groups:
            if not isinstance(group["lr"], torch.Tensor):
                group["lr"] = torch.tensor(
                    float(group["lr"]), dtype=torch.float64, device=self._step.device
                )
        constants = [
            tuple(float(value) for name in self._options for value in _values(group[name]))
            for group in self._optimizer.param_groups
        ]
        if constants != self._known:
            if not self._known:
                self._constants = self._constants.new_zeros(len(constants), len(constants[0]))
            self._constants.copy_(torch.tensor(constants, dtype=torch.float64))
            self._known = constants

    def store(self) -> None:
        """Write the step number to the param groups, for a checkpoint; waits for the device."""
        for group, step in zip(self._optimizer.param_groups, self._step.tolist(), strict=True):
            group["step"] = step

    def advance(self, seed: int) -> None:
        """Count a step and fill the table for it, as ``HyperTable.fill`` would."""
        if not (self._step.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._refresh()
        self._step += 1
        if not len(self._table):
            return
        rows = self._row_groups
        step = self._step[rows]
        lr = torch.stack([group["lr"] for group in self._optimizer.param_groups])[rows]
        values = self._rule.columns({"lr": lr, **self._by_name(rows)}, step.to(torch.float64))
        self._table.values[:, : len(values)].copy_(torch.stack(list(values), dim=1))
        for column, stream in (
            (columns.KEY_EXP_AVG_SQ, spec.STREAM_EXP_AVG_SQ),
            (columns.KEY_MASTER, spec.STREAM_MASTER),
        ):
            self._table.keys[:, column].copy_(rounding.launch_keys(seed, step, stream))

    def _by_name(self, rows: torch.Tensor) -> dict[str, Any]:
        """Return the options of each row, fp64 tensors or tuples of them."""
        columns = iter(self._constants[rows].unbind(dim=1))
        group = self._optimizer.param_groups[0]
        return {
            name: tuple(next(columns) for _ in group[name])
            if isinstance(group[name], tuple | list)
            else next(columns)
            for name in self._options
        }


def _values(option: Any) -> Sequence[Any]:
    return option if isinstance(option, tuple | list) else (option,)
