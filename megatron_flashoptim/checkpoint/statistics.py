"""Statistics of a checkpoint's state, a part and a range at a time.

Flash state is described as it is stored. Megatron's Adam, in fp32, is described as flash_adamw
would store it: encoded to nearest by the codec, so that codes, scales and errors can be seen
before anything is converted.

Quantization error. For fp32 state it is measured: what decode after encode changes. For flash
state the exact values are gone, and it is estimated from codes and scales:

- An element of code c came from the interval that rounds to c, with values spread evenly over it.
  With ``f(c)`` the decoded value at scale 1, the interval goes from ``lo = f(c - 1/2)`` to
  ``hi = f(c + 1/2)``, and the mean square of the error is
  ``scale^2 * ((hi - f(c))^3 + (f(c) - lo)^3) / (3 * (hi - lo))``. The interval of the top code ends
  at the scale; that of the smallest code of a second moment, forced where v > 0, begins at 0; the
  zero code of a second moment is exact.
- One element of each group, the largest, was rounded to a bf16 scale instead: ``ulp^2 / 12``.
- A 24-bit master is off by ``quantum^2 / 12``, with ``quantum`` 2^-15 of its binade; a 32-bit one
  is exact; a 16-bit one is rounded stochastically: ``ulp^2 / 6`` of bf16.

Errors of the second moment are those of its root, which is what a step divides by. This is the
error of one rounding to nearest; stochastic rounding makes the square twice as large.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import cache, partial

import torch

from megatron_flashoptim.checkpoint.conversion import SCALE_OF, encode_moment
from megatron_flashoptim.checkpoint.deviation import belongs, is_near
from megatron_flashoptim.checkpoint.folder import CheckpointFolder
from megatron_flashoptim.checkpoint.side_by_side import Ranges, Tell, each_unit
from megatron_flashoptim.checkpoint.state_parts import MASTER, WEIGHT, Part, decode, families, parts
from megatron_flashoptim.codec import join_master, split_master
from megatron_flashoptim.codec.spec import (
    EXP_AVG_MAX_CODE,
    EXP_AVG_SQ_MAX_CODE,
    GROUP_SIZE,
    ExpAvgSqCode,
)
from megatron_flashoptim.optim.shard import CORRECTION, EXP_AVG, EXP_AVG_SQ

# Codes are counted as int8 + 128 (first moment, correction) or uint8 (second moment).
CODES = 256
SIGNED_ZERO = 128
# Binades are counted by fp32's biased exponent; 0 holds zeros and what is below 2^-126.
BINADES = 256
BIAS = 127

_STEP_OF_BF16 = 2.0**-7
_STEP_OF_24_BITS = 2.0**-15


@dataclass
class Statistics:
    """What is known of one kind of state of a part, or of several parts together.

    Sums and counts, so that adding is exact; shares and norms are made from them.

    Attributes:
        kind: ``"weight"``, ``"master"``, ``"correction"``, ``"exp_avg"`` or ``"exp_avg_sq"``.
        elements: number of elements.
        nonfinite: of these Inf or NaN; the sums leave them out.
        squares: sum of squares of the values.
        largest: largest magnitude.
        reference: sum of squares that ``error`` is relative to: ``squares``, but for the second
            moment the sum of the squares of its root.
        error: sum of squared quantization errors, None where there are none to tell.
        codes: int64 (256), number of elements by code; None without codes.
        binades: int64 (256), number of elements by biased exponent of the value; for the second
            moment of its root.
        scale_binades: int64 (256), number of scales by biased exponent.
        scales, zero_scales, nan_scales: number of scales, of those that are 0, and NaN.
        smallest_scale, largest_scale: of those above 0; inf and 0 where there are none.
    """

    kind: str
    elements: int = 0
    nonfinite: int = 0
    squares: float = 0.0
    largest: float = 0.0
    reference: float = 0.0
    error: float | None = None
    codes: torch.Tensor | None = None
    binades: torch.Tensor = field(default_factory=lambda: torch.zeros(BINADES, dtype=torch.int64))
    scale_binades: torch.Tensor | None = None
    scales: int = 0
    zero_scales: int = 0
    nan_scales: int = 0
    smallest_scale: float = math.inf
    largest_scale: float = 0.0

    def add(self, other: Statistics) -> None:
        """Take in other elements of the same kind."""
        for name in ("elements", "nonfinite", "squares", "reference", "scales"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.zero_scales += other.zero_scales
        self.nan_scales += other.nan_scales
        self.largest = max(self.largest, other.largest)
        self.smallest_scale = min(self.smallest_scale, other.smallest_scale)
        self.largest_scale = max(self.largest_scale, other.largest_scale)
        self.binades = self.binades + other.binades
        if other.error is not None:
            self.error = (self.error or 0.0) + other.error
        for name in ("codes", "scale_binades"):
            theirs, mine = getattr(other, name), getattr(self, name)
            if theirs is not None:
                setattr(self, name, theirs if mine is None else mine + theirs)

    @property
    def norm(self) -> float:
        """Root of the sum of squares of the finite values."""
        return math.sqrt(self.squares)

    @property
    def relative_error(self) -> float | None:
        """Root of the summed squares of errors over that of values; None if not known."""
        if self.error is None:
            return None
        return math.sqrt(self.error / self.reference) if self.reference else 0.0

    @property
    def saturated(self) -> float | None:
        """Share of elements at the code of the largest magnitude."""
        if self.kind == EXP_AVG_SQ:
            return self._share((EXP_AVG_SQ_MAX_CODE,))
        most = EXP_AVG_MAX_CODE
        lowest = -most if self.kind == EXP_AVG else -most - 1
        return self._share((SIGNED_ZERO + lowest, SIGNED_ZERO + most))

    @property
    def zero(self) -> float | None:
        """Share of elements at code 0."""
        return self._share((0,) if self.kind == EXP_AVG_SQ else (SIGNED_ZERO,))

    @property
    def minimum(self) -> float | None:
        """Share of elements at the smallest code that is not 0."""
        signed = (SIGNED_ZERO - 1, SIGNED_ZERO + 1)
        return self._share((1,) if self.kind == EXP_AVG_SQ else signed)

    def _share(self, codes: Iterable[int]) -> float | None:
        if self.codes is None or not self.elements:
            return None
        return sum(int(self.codes[code]) for code in codes) / self.elements


@dataclass
class Inspection:
    """Statistics of all parts of a checkpoint.

    Attributes:
        folder: the checkpoint.
        parts: each with its statistics by kind.
        not_of_weights: labels of parts whose master, rounded to bf16, is not the weight.
        checked: number of parts of which that was checked.
    """

    folder: CheckpointFolder
    parts: list[tuple[Part, dict[str, Statistics]]] = field(default_factory=list)
    not_of_weights: list[str] = field(default_factory=list)
    checked: int = 0

    def families(self, kind: str) -> dict[str, list[tuple[Part, Statistics]]]:
        """Return parts that have a kind by name, in the order of depth."""
        return families(self.parts, kind)

    def has_masters_of_weights(self) -> bool:
        """Return whether masters are known by tensor, so that weights say nothing more."""
        return any({WEIGHT, MASTER} <= set(statistics) for _, statistics in self.parts)

    def total(self, kind: str) -> Statistics:
        """Return the statistics of a kind over all parts."""
        total = Statistics(kind)
        for _, statistics in self.parts:
            if kind in statistics:
                total.add(statistics[kind])
        return total


def inspect(
    folder: CheckpointFolder, progress: Tell = lambda *_: None, *, executor: Executor | None = None
) -> Inspection:
    """Read a whole checkpoint and return its statistics.

    Args:
        folder: the checkpoint.
        progress: told what is done, elements done and all elements.
        executor: processes that read side by side, see ``side_by_side.pool``.

    Raises:
        ValueError: the checkpoint is damaged; says which file or tensor.
    """
    every = parts(folder)
    found: list[dict[str, Statistics]] = [
        {kind: Statistics(kind) for kind in part.kinds()} for part in every
    ]
    belong: dict[int, bool] = {}
    tell = partial(progress, "reading")
    for number, (statistics, is_of_weight) in each_unit(
        statistics_of, [folder], every, executor, tell
    ):
        for kind, each in statistics.items():
            found[number][kind].add(each)
        if is_of_weight is not None:
            belong[number] = belong.get(number, True) and is_of_weight
    return Inspection(
        folder,
        list(zip(every, found, strict=True)),
        [every[number].label for number, is_of_weight in belong.items() if not is_of_weight],
        len(belong),
    )


@torch.no_grad()
def statistics_of(ranges: Ranges, part: Part) -> tuple[dict[str, Statistics], bool | None]:
    """Return statistics by kind of some ranges of a part, and whether masters are the weights'.

    The second is None where there is nothing to check: of flash state the weights are the masters'
    high part.
    """
    found = {kind: Statistics(kind) for kind in part.kinds()}
    is_of_weight: bool | None = None
    check = not part.flash and {WEIGHT, MASTER} <= set(found)
    for start, end in ranges:
        for kind, statistics in found.items():
            values = part.values(kind, start, end)
            _add_values(statistics, values)
            if kind == MASTER:
                _add_master(statistics, part, values, start, end)
            elif kind == CORRECTION:
                _add_codes(statistics, _index(part.stored(kind, start, end)))
            elif kind in SCALE_OF:
                _add_moment(statistics, part, values, start, end)
            if check and kind == MASTER and is_of_weight is not False:
                same = is_near if part.quantized else belongs
                is_of_weight = same(values, part.stored(WEIGHT, start, end))
    return found, is_of_weight


def _add_values(statistics: Statistics, values: torch.Tensor) -> None:
    statistics.elements += values.numel()
    finite = values.isfinite()
    bad = values.numel() - int(finite.count_nonzero())
    if bad:
        statistics.nonfinite += bad
        values = torch.where(finite, values, 0.0)
    exact = values.to(torch.float64)
    squares = float(exact.square().sum())
    statistics.squares += squares
    if values.numel():
        statistics.largest = max(statistics.largest, float(values.abs().amax()))
    seen = values
    if statistics.kind == EXP_AVG_SQ:
        seen = values.abs().sqrt()
        statistics.reference += float(exact.clamp(min=0).sum())
    else:
        statistics.reference += squares
    exponents = (seen.contiguous().view(torch.int32) >> 23) & 0xFF
    statistics.binades += torch.bincount(exponents, minlength=BINADES)


def _add_master(
    statistics: Statistics, part: Part, values: torch.Tensor, start: int, end: int
) -> None:
    if not part.flash:
        high, correction = split_master(values, bits=24)
        assert correction is not None
        _add_codes(statistics, _index(correction))
        error = _square_of_difference(join_master(high, correction), values)
    elif CORRECTION in part.keys:
        correction = part.stored(CORRECTION, start, end)
        _add_codes(statistics, _index(correction))
        is_exact = correction.dtype == torch.int16
        error = 0.0 if is_exact else _square_of_steps(values, _STEP_OF_24_BITS) / 12
    else:
        is_exact = part.dtype(part.high) == torch.float32
        error = 0.0 if is_exact else _square_of_steps(values, _STEP_OF_BF16) / 6
    statistics.error = (statistics.error or 0.0) + error


def _add_moment(
    statistics: Statistics, part: Part, values: torch.Tensor, start: int, end: int
) -> None:
    moment = statistics.kind
    if part.flash:
        codes, scale = part.encoded(moment, start, end)
        error = implied_error(moment, codes, scale, code=part.code)
    else:
        codes, scale = encode_moment(moment, values, code=part.code)
        decoded = decode(moment, codes, scale, code=part.code)
        if moment == EXP_AVG_SQ:
            decoded, values = decoded.sqrt(), values.sqrt()
        error = _square_of_difference(decoded, values)
    statistics.error = (statistics.error or 0.0) + error
    _add_codes(statistics, _index(codes))
    _add_scales(statistics, scale)


def _add_codes(statistics: Statistics, index: torch.Tensor) -> None:
    counted = torch.bincount(index, minlength=CODES)
    statistics.codes = counted if statistics.codes is None else statistics.codes + counted


def _add_scales(statistics: Statistics, scale: torch.Tensor) -> None:
    statistics.scales += scale.numel()
    statistics.nan_scales += int(scale.isnan().count_nonzero())
    statistics.zero_scales += int((scale == 0).count_nonzero())
    usable = scale[scale > 0].to(torch.float32)
    if usable.numel():
        statistics.smallest_scale = min(statistics.smallest_scale, float(usable.min()))
        statistics.largest_scale = max(statistics.largest_scale, float(usable.max()))
    counted = torch.bincount(usable.view(torch.int32) >> 23, minlength=BINADES)
    before = statistics.scale_binades
    statistics.scale_binades = counted if before is None else before + counted


def _index(codes: torch.Tensor) -> torch.Tensor:
    """Return the number under which each code is counted; of an int16 its upper byte."""
    if codes.dtype == torch.uint8:
        return codes.to(torch.int64)
    index = codes.to(torch.int64)
    return (index >> 8 if codes.dtype == torch.int16 else index) + SIGNED_ZERO


def implied_error(
    moment: str, codes: torch.Tensor, scale: torch.Tensor, *, code: ExpAvgSqCode = "sqrt"
) -> float:
    """Return the expected sum of squared errors of encoding, see the module's docstring.

    Args:
        moment: ``"exp_avg"``, or ``"exp_avg_sq"`` for the error of the root.
        codes: flat int8 or uint8, n elements, the first at a whole group.
        scale: bf16, ceil(n / 32), or n where each element has its own: which groups they were
            is then unknown, and the largest of each counts as any other.
        code: of the second moment.
    """
    table = _cell_errors(moment, code)
    errors = table[_index(codes)]
    step = torch.where(scale.isfinite(), scale, 0.0).to(torch.float64)
    if scale.numel() == codes.numel() and codes.numel() > 1:
        return float((errors * step.square()).sum())
    missing = -errors.numel() % GROUP_SIZE
    errors = torch.nn.functional.pad(errors, (0, missing)).view(-1, GROUP_SIZE).sum(dim=1)
    # The largest element: of its scale's own rounding instead of the top code's interval.
    ulp = torch.where(step > 0, _STEP_OF_BF16 * 2.0 ** (torch.frexp(step).exponent - 1), 0.0)
    return float(((errors - table[-1]) * step.square() + ulp.square() / 12).sum())


@cache
def _cell_errors(moment: str, code: ExpAvgSqCode) -> torch.Tensor:
    """Return the mean squared error of an element at scale 1 by its code's number, fp64 (256)."""

    def decoded(level: float) -> float:
        if moment == EXP_AVG:
            ratio = level / EXP_AVG_MAX_CODE
            return ratio / (2 - abs(ratio))
        return (level / EXP_AVG_SQ_MAX_CODE) ** (1 if code == "sqrt" else 2)

    def mean_square(level: int, top: int, *, forced: bool) -> float:
        at = decoded(level)
        low = 0.0 if forced and level == 1 else decoded(level - 0.5)
        high = decoded(min(level + 0.5, top))
        return ((high - at) ** 3 + (at - low) ** 3) / (3 * (high - low))

    if moment == EXP_AVG_SQ:
        levels = range(1, CODES)
        found = [0.0, *(mean_square(n, EXP_AVG_SQ_MAX_CODE, forced=True) for n in levels)]
    else:
        levels = range(-SIGNED_ZERO, SIGNED_ZERO)
        clamped = (min(abs(n), EXP_AVG_MAX_CODE) for n in levels)
        found = [mean_square(n, EXP_AVG_MAX_CODE, forced=False) for n in clamped]
    return torch.tensor(found, dtype=torch.float64)


def _square_of_steps(values: torch.Tensor, step: float) -> float:
    """Return the sum of the squares of a step relative to each value's binade."""
    finite = torch.where(values.isfinite(), values, 0.0).to(torch.float64)
    binade = torch.where(finite != 0, 2.0 ** (torch.frexp(finite).exponent - 1), 0.0)
    return float((binade * step).square().sum())


def _square_of_difference(stored: torch.Tensor, exact: torch.Tensor) -> float:
    difference = stored.to(torch.float64) - exact.to(torch.float64)
    return float(torch.where(difference.isfinite(), difference, 0.0).square().sum())
