"""HyperTable: the hyper-parameters of one step, one row per parameter group, on the device."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_flashoptim.codec import rounding, spec
from megatron_flashoptim.kernels import columns


@dataclass(frozen=True)
class AdamHyper:
    """Hyper-parameters of one row: floats as in ``torch.optim.AdamW``, ``step`` from 1 up."""

    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    step: int
    bias_correction: bool = True

    def row(self, seed: int) -> bytes:
        """Pack the row: fp32 columns, then the two random keys of this step."""
        correction1 = 1.0 - self.beta1**self.step if self.bias_correction else 1.0
        correction2 = 1.0 - self.beta2**self.step if self.bias_correction else 1.0
        return struct.pack(
            "8f2I",
            self.lr / correction1,
            self.lr * self.weight_decay,
            self.beta1,
            1.0 - self.beta1,
            self.beta2**0.5,
            (1.0 - self.beta2) ** 0.5,
            self.eps,
            correction2**-0.5,
            rounding.launch_key(seed, self.step, spec.STREAM_EXP_AVG_SQ),
            rounding.launch_key(seed, self.step, spec.STREAM_MASTER),
        )


class HyperTable:
    """Persistent device table, refilled by one small asynchronous copy per step.

    Args:
        rows: number of rows.
        device: where the table lives.

    Attributes:
        keys: int32 view ``(rows, columns)``, see ``kernels.columns``.
        values: fp32 view of the same storage.
        grad_scale: fp32 ``(rows,)``, the factor on the gradients of each row (clip coefficient
            times inverse loss scale).
        skip: fp32, one element; a step changes nothing where it is not 0 (an overflow was found).
    """

    def __init__(self, rows: int, device: torch.device | str) -> None:
        self.keys = torch.zeros(rows, columns.COLUMNS, dtype=torch.int32, device=device)
        self.values = self.keys.view(torch.float32)
        self.grad_scale = torch.ones(rows, dtype=torch.float32, device=device)
        self.skip = torch.zeros(1, dtype=torch.float32, device=device)

    def __len__(self) -> int:
        return self.keys.shape[0]

    def fill(self, rows: Sequence[AdamHyper], *, seed: int) -> None:
        """Upload the rows of this step.

        Raises:
            ValueError: another number of rows than the table has.
        """
        if len(rows) != len(self):
            raise ValueError(f"the table has {len(self)} rows, got {len(rows)}")
        if rows:
            packed = bytearray(b"".join(row.row(seed) for row in rows))
            host = torch.frombuffer(packed, dtype=torch.int32).view_as(self.keys)
            self.keys.copy_(host, non_blocking=True)

    def nbytes(self) -> int:
        """Return the bytes held on the device."""
        return self.keys.nbytes + self.grad_scale.nbytes + self.skip.nbytes
