"""DeviceHyper: the hyper-parameters of a step computed on the device, for CUDA graphs.

A captured step runs no Python. What changes from step to step is then read from device memory: the
step number, which the captured step itself counts, and the learning rate, which a scheduler fills
in. The rest of a param group is fixed when the step is captured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_flashoptim.codec import rounding, spec
from megatron_flashoptim.kernels import columns
from megatron_flashoptim.optim.hyper import HyperTable


class DeviceHyper:
    """Fills a hyper-parameter table without the host.

    ``lr`` of every param group becomes an fp64 scalar tensor on the device, which Megatron's
    scheduler fills in place. Decay rates, ``eps`` and weight decay are taken from the param groups
    at each step that is not captured; a captured one keeps those of the step before it.

    Args:
        optimizer: its param groups have the entries of ``torch.optim.AdamW`` and ``step``.
        table: the table, of one row per entry of ``row_groups``.
        row_groups: for each row, the index of its param group.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, table: HyperTable, row_groups: Sequence[int]
    ) -> None:
        self._optimizer = optimizer
        self._table = table
        device = table.keys.device
        self._row_groups = torch.tensor(row_groups, dtype=torch.int64, device=device)
        groups = len(optimizer.param_groups)
        self._step = torch.zeros(groups, dtype=torch.int64, device=device)
        # beta1, beta2, eps and weight decay of each param group.
        self._constants = torch.zeros(groups, 4, dtype=torch.float64, device=device)
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
            (*group["betas"], group["eps"], group["weight_decay"])
            for group in self._optimizer.param_groups
        ]
        if constants != self._known:
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
        beta1, beta2, eps, weight_decay = self._constants[rows].unbind(dim=1)
        exponent = step.to(torch.float64)
        values = [
            lr / (1.0 - beta1**exponent),
            lr * weight_decay,
            beta1,
            1.0 - beta1,
            beta2.sqrt(),
            (1.0 - beta2).sqrt(),
            eps,
            (1.0 - beta2**exponent) ** -0.5,
        ]
        self._table.values[:, : len(values)].copy_(torch.stack(values, dim=1))
        for column, stream in (
            (columns.KEY_EXP_AVG_SQ, spec.STREAM_EXP_AVG_SQ),
            (columns.KEY_MASTER, spec.STREAM_MASTER),
        ):
            self._table.keys[:, column].copy_(rounding.launch_keys(seed, step, stream))
