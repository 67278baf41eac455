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


class DeviceHyper:
    """Fills a hyper-parameter table without the host.

    Turns ``lr`` of every param group into an fp64 scalar tensor on the device, which Megatron's
    scheduler fills in place.

    Args:
        table: the table, of one row per entry of ``row_groups``.
        param_groups: param groups as of ``torch.optim.AdamW``, with ``step``.
        row_groups: for each row, the index of its param group.
    """

    def __init__(
        self,
        table: HyperTable,
        param_groups: Sequence[dict[str, Any]],
        row_groups: Sequence[int],
    ) -> None:
        self._table = table
        self._param_groups = param_groups
        self._rows = [param_groups[index] for index in row_groups]
        device = table.keys.device
        for group in param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float64, device=device)
        self.step = torch.zeros(len(table), dtype=torch.int64, device=device)
        self._betas = self._column([group["betas"] for group in self._rows])
        self._eps = self._column([group["eps"] for group in self._rows])
        self._weight_decay = self._column([group["weight_decay"] for group in self._rows])

    def _column(self, values: Sequence[Any]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.step.device)

    def load(self) -> None:
        """Take over step numbers and weight decay of the param groups, after they were loaded."""
        self.step.copy_(torch.tensor([group["step"] for group in self._rows], dtype=torch.int64))
        self._weight_decay.copy_(self._column([group["weight_decay"] for group in self._rows]))

    def store(self) -> None:
        """Write the step number to the param groups, for a checkpoint; waits for the device."""
        for group, step in zip(self._rows, self.step.tolist(), strict=True):
            group["step"] = step

    def advance(self, seed: int) -> None:
        """Count a step and fill the table for it, as ``HyperTable.fill`` would."""
        if not self._rows:
            return
        self.step += 1
        lr = torch.stack([group["lr"] for group in self._rows])
        beta1, beta2 = self._betas.unbind(dim=1)
        step = self.step.to(torch.float64)
        values = [
            lr / (1.0 - beta1**step),
            lr * self._weight_decay,
            beta1,
            1.0 - beta1,
            beta2.sqrt(),
            (1.0 - beta2).sqrt(),
            self._eps,
            (1.0 - beta2**step) ** -0.5,
        ]
        self._table.values[:, : len(values)].copy_(torch.stack(values, dim=1))
        for column, stream in (
            (columns.KEY_EXP_AVG_SQ, spec.STREAM_EXP_AVG_SQ),
            (columns.KEY_MASTER, spec.STREAM_MASTER),
        ):
            self._table.keys[:, column].copy_(rounding.launch_keys(seed, self.step, stream))
