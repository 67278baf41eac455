"""HyperTable: the hyper-parameters of one step, one row per parameter group, on the device."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_flashoptim.codec import rounding, spec
from megatron_flashoptim.kernels import columns
from megatron_flashoptim.optim.rules import Rule


@dataclass(frozen=True)
class HyperRow:
    """One row of the table.

    Attributes:
        values: the rule's columns, at most ``kernels.columns.VALUES``.
        step: number of the step, from 1 up.
    """

    values: Sequence[float]
    step: int

    @classmethod
    def of(cls, rule: Rule, group: Mapping[str, Any]) -> HyperRow:
        """Return the row of a param group of a rule, which has its ``step``."""
        return cls(rule.columns(group, group["step"]), group["step"])

    def pack(self, seed: int) -> bytes:
        """Pack the row: fp32 columns, then the two random keys of this step."""
        unused = [0.0] * (columns.VALUES - len(self.values))
        return struct.pack(
            f"{columns.VALUES}f2I",
            *self.values,
            *unused,
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
        self._uploads: deque[torch.Tensor] = deque(maxlen=8)

    def __len__(self) -> int:
        return self.keys.shape[0]

    def fill(self, rows: Sequence[HyperRow], *, seed: int) -> None:
        """Upload the rows of this step.

        Raises:
            ValueError: another number of rows than the table has.
        """
        if len(rows) != len(self):
            raise ValueError(f"the table has {len(self)} rows, got {len(rows)}")
        if rows:
            packed = bytearray(b"".join(row.pack(seed) for row in rows))
            host = torch.frombuffer(packed, dtype=torch.int32).view_as(self.keys)
            self.keys.copy_(host, non_blocking=True)
            # Where a GPU reads the host's memory itself, the copy may come after the call.
            self._uploads.append(host)

    def nbytes(self) -> int:
        """Return the bytes held on the device."""
        return self.keys.nbytes + self.grad_scale.nbytes + self.skip.nbytes
