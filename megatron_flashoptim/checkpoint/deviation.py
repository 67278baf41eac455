"""How far converted state is from what it was made of, and whether it belongs to the weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_flashoptim.checkpoint.folder import MASTER
from megatron_flashoptim.codec import split_master
from megatron_flashoptim.codec.spec import GROUP_SIZE
from megatron_flashoptim.optim.shard import EXP_AVG, EXP_AVG_SQ

KINDS = (MASTER, EXP_AVG, EXP_AVG_SQ)
# Elements looked at together; temporary tensors are a few times as large.
AT_ONCE = 1 << 17
# Parameters to name in an error.
_MAX_NAMED = 8


@dataclass
class Deviation:
    """How far encoded values are from those that were encoded.

    Attributes:
        largest: largest error of an element, relative to the element (masters) or to the largest
            of its group of 32 (moments).
        error, total: sums of all absolute errors and of all absolute values.
    """

    largest: float = 0.0
    error: float = 0.0
    total: float = 0.0

    def add(self, other: Deviation) -> None:
        """Take another part of the state in."""
        self.largest = max(self.largest, other.largest)
        self.error += other.error
        self.total += other.total

    @property
    def mean(self) -> float:
        """Sum of errors over sum of values."""
        return self.error / self.total if self.total else 0.0


@dataclass
class Report:
    """What was converted on a rank, or on all of them.

    Attributes:
        parameters: ranges of parameters converted.
        elements: their elements.
        deviations: by kind of state.
        damaged: names of parameters whose weight is not the bf16 of their master.
        problem: why state could not be read, if so.
    """

    parameters: int = 0
    elements: int = 0
    deviations: dict[str, Deviation] = field(
        default_factory=lambda: {kind: Deviation() for kind in KINDS}
    )
    damaged: list[str] = field(default_factory=list)
    problem: str | None = None

    def add(self, other: Report) -> None:
        """Take another rank's report in."""
        self.parameters += other.parameters
        self.elements += other.elements
        for kind, deviation in other.deviations.items():
            self.deviations[kind].add(deviation)
        self.damaged += [name for name in other.damaged if name not in self.damaged]
        self.problem = self.problem or other.problem

    def check(self) -> None:
        """Refuse state that does not belong to the weights.

        Raises:
            ValueError: names the parameters, or says what could not be read.
        """
        if self.problem is not None:
            raise ValueError(self.problem)
        if self.damaged:
            raise ValueError(
                f"the Adam state in the checkpoint does not belong to its weights: the fp32 master "
                f"rounded to bf16 is not the weight in {named(self.damaged)}. "
                "Megatron's fully_reshardable save shifts masters and moments where buckets end in "
                "padding (--overlap-grad-reduce). The weights are right: `megatron-flashoptim "
                "convert --to flash --repair` makes masters of them and drops the moments of these "
                "parameters; or load the weights alone with --no-load-optim --no-load-rng or "
                "--finetune; or take a checkpoint saved with dp_reshardable (without "
                "--dist-ckpt-optim-fully-reshardable)"
            )

    def text(self, *, by_ranks: bool = True) -> str:
        """Return one line: what was converted, with its errors.

        Args:
            by_ranks: while loading, so that the line is one of a run's log, and a parameter that
                several ranks have parts of was counted by each of them.
        """
        errors = [
            f"of {'masters' if kind == MASTER else kind} largest {found.largest:.2e}, "
            f"mean {found.mean:.2e}"
            for kind, found in self.deviations.items()
            if found.total  # else there were none, or all are zero
        ]
        text = (
            f"converted to flash state{' without a problem' if by_ranks else ''}: {self.elements} "
            f"elements in {self.parameters} parameters"
            f"{' (one that ranks share is counted by each)' if by_ranks else ''}; "
            f"relative errors {', '.join(errors) or '0'}"
        )
        if any(self.deviations[moment].total for moment in (EXP_AVG, EXP_AVG_SQ)):
            text += " (moments: largest is relative to the largest of each 32 elements)"
        return text


def named(parameters: Sequence[str]) -> str:
    """Return how many parameters there are, and the names of the first."""
    more = len(parameters) - _MAX_NAMED
    names = ", ".join(parameters[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
    return f"{len(parameters)} parameters ({names})"


def check_dtypes(dtypes: Iterable[str], folder: object) -> None:
    """Refuse weights that no flash optimizer takes, whatever their state.

    Args:
        dtypes: of the weights that have optimizer state, as ``"torch.bfloat16"``.
        folder: of the checkpoint, for the message.

    Raises:
        ValueError: names the dtype and what to do.
    """
    others = sorted(set(dtypes) - {str(torch.bfloat16), str(torch.float32)})
    if others:
        raise ValueError(
            f"the weights in {folder} are {others[0].removeprefix('torch.')}: flash optimizers "
            "take bf16 or fp32. Have Megatron's Adam load it with --bf16, train a step and save, "
            "and take that; or load the weights alone with --no-load-optim --no-load-rng, or "
            "--finetune; `megatron-flashoptim convert --to weights` takes the fp32 masters"
        )


def were_quantized(common: dict[str, Any]) -> bool:
    """Return whether the common state of a checkpoint is of a run with quantized weights."""
    return bool(getattr(common.get("args"), "fp8_param_gather", False))


def check_not_quantized(common: dict[str, Any], folder: object) -> None:
    """Refuse state of Megatron's Adam whose weights are no masters rounded to bf16.

    Args:
        common: the checkpoint's common state.
        folder: of the checkpoint, for the message.

    Raises:
        ValueError: it was saved with ``--fp8-param-gather``.
    """
    if were_quantized(common):
        raise ValueError(
            f"{folder} was saved by Adam with --fp8-param-gather: its weights are FP8 values, by "
            "which its masters cannot be checked. Load it with --fp8-param-gather, the same "
            "layers in FP8 and --optimizer flash_adamw, which converts it and can save it for runs "
            "without; or have Adam load it without --fp8-param-gather, train a step and save"
        )


def is_near(master: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether the weights can be the masters in FP8, which is 3 % off on average.

    Args:
        master: flat fp32, in host memory.
        weight: flat, of the same length.
    """
    error = total = 0.0
    for start in range(0, master.numel(), AT_ONCE):
        exact = master[start : start + AT_ONCE]
        error += float((weight[start : start + AT_ONCE].to(exact) - exact).abs().sum())
        total += float(exact.abs().sum())
    return error <= 0.1 * total


def belongs(master: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether the weights are the masters, rounded to nearest, ties to even or away.

    Args:
        master: flat fp32, in host memory.
        weight: flat, of the same length and the model's dtype.
    """
    for start in range(0, master.numel(), AT_ONCE):
        exact = master[start : start + AT_ONCE]
        rounded = weight[start : start + AT_ONCE].cpu()
        same = exact.isnan() & rounded.isnan()
        if rounded.dtype == torch.float32:  # of a run in fp32, or saved as bf16 by one that was not
            same |= (exact == rounded) | (exact.to(torch.bfloat16).to(torch.float32) == rounded)
        else:
            # Transformer Engine's int16 remainders round ties away from zero.
            away, _ = split_master(exact, bits=32)
            same |= (exact.to(rounded.dtype) == rounded) | (away == rounded)
        if not same.all():
            return False
    return True


def of_master(stored: torch.Tensor, exact: torch.Tensor) -> Deviation:
    """Return the error of flat fp32 masters."""
    return _deviation(stored, exact, exact.abs())


def of_moment(stored: torch.Tensor, exact: torch.Tensor) -> Deviation:
    """Return the error of a flat fp32 moment, the first element at the start of a group."""
    padded = torch.nn.functional.pad(exact.abs(), (0, -exact.numel() % GROUP_SIZE))
    largest = padded.view(-1, GROUP_SIZE).amax(dim=1)
    return _deviation(stored, exact, largest.repeat_interleave(GROUP_SIZE)[: exact.numel()])


def _deviation(stored: torch.Tensor, exact: torch.Tensor, reference: torch.Tensor) -> Deviation:
    error = (stored - exact).abs()
    relative = torch.where(error > 0, error / reference, 0.0)
    return Deviation(
        largest=float(relative.max()) if relative.numel() else 0.0,
        error=float(error.sum(dtype=torch.float64)),
        total=float(exact.abs().sum(dtype=torch.float64)),
    )
