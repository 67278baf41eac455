"""Two checkpoints side by side: how far weights, masters and moments are from each other.

Both are decoded to fp32, so that Megatron's Adam can be compared with flash state, and layouts with
each other, as long as they are in model space. Buckets compare with the same buckets only.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial

import torch

from megatron_flashoptim.checkpoint.folder import CheckpointFolder
from megatron_flashoptim.checkpoint.metadata import DP_RESHARDABLE
from megatron_flashoptim.checkpoint.side_by_side import Ranges, Tell, each_unit
from megatron_flashoptim.checkpoint.state_parts import KINDS, Part, families, parts
from megatron_flashoptim.codec.spec import GROUP_SIZE
from megatron_flashoptim.optim.shard import EXP_AVG, EXP_AVG_SQ


@dataclass
class Difference:
    """How far one kind of state of a part is from that of another checkpoint.

    Attributes:
        kind: of the state.
        elements: number of elements compared.
        differing: of these, not equal as fp32 (NaN equals NaN).
        error, total: sums of absolute differences, and of absolute values of the first.
        largest: largest difference, relative to the larger of the two elements (weights, masters)
            or to the largest of their group of 32 in either (moments).
    """

    kind: str
    elements: int = 0
    differing: int = 0
    error: float = 0.0
    total: float = 0.0
    largest: float = 0.0

    @property
    def mean(self) -> float:
        """Sum of differences over the sum of values."""
        if not self.error:
            return 0.0
        return self.error / self.total if self.total else float("inf")

    @property
    def share(self) -> float:
        """Share of elements that differ."""
        return self.differing / self.elements if self.elements else 0.0

    def add(self, other: Difference) -> None:
        """Take in other elements."""
        self.elements += other.elements
        self.differing += other.differing
        self.error += other.error
        self.total += other.total
        self.largest = max(self.largest, other.largest)


@dataclass
class Comparison:
    """All parts of two checkpoints.

    Attributes:
        first, second: the checkpoints.
        parts: those that both have, with the differences by kind.
        only: what one of them has: kinds that no part of the other has (``"exp_avg_sq"``), labels
            of parts, and kinds of a part (``"LABEL kind"``).
    """

    first: CheckpointFolder
    second: CheckpointFolder
    parts: list[tuple[Part, dict[str, Difference]]] = field(default_factory=list)
    only: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))

    def families(self, kind: str) -> dict[str, list[tuple[Part, Difference]]]:
        """Return parts that have a kind by name, in the order of depth."""
        return families(self.parts, kind)

    def total(self, kind: str) -> Difference:
        """Return the difference of a kind over all parts."""
        total = Difference(kind)
        for _, differences in self.parts:
            if kind in differences:
                total.add(differences[kind])
        return total


def compare(
    first: CheckpointFolder,
    second: CheckpointFolder,
    progress: Tell = lambda *_: None,
    *,
    executor: Executor | None = None,
) -> Comparison:
    """Read two checkpoints and return how they differ.

    Args:
        first, second: the checkpoints.
        progress: told what is done, elements done and all elements.
        executor: processes that read side by side, see ``side_by_side.pool``.

    Raises:
        ValueError: the state of one is in buckets and that of the other is not, or in other
            buckets; or a tensor has another shape in each.
    """
    check_comparable(first, second)
    mine, theirs = parts(first), parts(second)
    others = {(part.name, part.index): part for part in theirs}
    found: list[dict[str, Difference]] = [{} for _ in mine]
    tell = partial(progress, "comparing")
    for number, differences in each_unit(difference, [first, second], mine, executor, tell):
        for kind, each in differences.items():
            found[number].setdefault(kind, Difference(kind)).add(each)
    kinds = [{kind for part in each for kind in part.kinds()} for each in (mine, theirs)]
    lacking = [[kind for kind in KINDS if kind in kinds[a] - kinds[1 - a]] for a in (0, 1)]
    comparison = Comparison(first, second, only=(lacking[0].copy(), lacking[1].copy()))
    for part, differences in zip(mine, found, strict=True):
        other = others.pop((part.name, part.index), None)
        if other is None:
            comparison.only[0].append(part.label)
            continue
        for one, two, only in ((part, other, 0), (other, part, 1)):
            comparison.only[only].extend(
                f"{part.label} {kind}"
                for kind in one.kinds()
                if kind not in two.kinds() and kind not in lacking[only]
            )
        comparison.parts.append((part, differences))
    comparison.only[1].extend(part.label for part in others.values())
    return comparison


def check_comparable(first: CheckpointFolder, second: CheckpointFolder) -> None:
    """Refuse what cannot be compared; reads descriptions alone.

    Raises:
        ValueError: the state of one is in buckets and that of the other is not, or in others.
    """
    with_state = [each for each in (first, second) if each.sharding_type]
    if len({each.sharding_type == DP_RESHARDABLE for each in with_state}) > 1:
        told = " and ".join(f"{each.sharding_type} ({each.path})" for each in with_state)
        raise ValueError(
            f"cannot compare optimizer state in {told}: buckets do not say which parameter is "
            "where. Save both with --dist-ckpt-optim-fully-reshardable, or both with "
            "dp_reshardable and the same layout"
        )
    if len(with_state) == 2 and first.sharding_type == DP_RESHARDABLE:
        _check_buckets(parts(first), parts(second))


@torch.no_grad()
def difference(ranges: Ranges, part: Part, other: Part | None) -> dict[str, Difference]:
    """Return how far some ranges of a part are from those of another, by kind.

    Raises:
        ValueError: the parts have different numbers of elements.
    """
    if other is None:
        return {}
    if not _in_buckets(part) and part.elements != other.elements:
        raise ValueError(
            f"{part.label} has {part.elements} elements in one checkpoint and {other.elements} in "
            "the other: they are of different models, or their vocabularies are padded differently "
            "(--make-vocab-size-divisible-by and the tensor parallel size)"
        )
    kinds = [kind for kind in KINDS if kind in part.kinds() and kind in other.kinds()]
    found = {kind: Difference(kind) for kind in kinds}
    for start, end in ranges:
        for begin, stop in _common(other, start, end):
            for kind in kinds:
                a, b = (each.values(kind, begin, stop) for each in (part, other))
                _add(found[kind], a, b, kind)
    return found


def _add(found: Difference, a: torch.Tensor, b: torch.Tensor, kind: str) -> None:
    found.elements += a.numel()
    differs = (a != b) & ~(a.isnan() & b.isnan())
    found.differing += int(differs.count_nonzero())
    found.total += float(torch.where(a.isfinite(), a, 0.0).abs().sum(dtype=torch.float64))
    error = torch.where(differs, (a - b).abs(), 0.0)
    found.error += float(error.sum(dtype=torch.float64))
    reference = torch.maximum(a.abs(), b.abs())
    if kind in (EXP_AVG, EXP_AVG_SQ):
        missing = -a.numel() % GROUP_SIZE
        groups = torch.nn.functional.pad(reference, (0, missing)).view(-1, GROUP_SIZE)
        largest = groups.amax(dim=1).repeat_interleave(GROUP_SIZE)
        reference = largest[: a.numel()]
    relative = torch.where(error > 0, error / reference, 0.0)
    # A number beside an Inf or NaN differs by everything.
    relative = torch.where(differs & ~relative.isfinite(), float("inf"), relative)
    if relative.numel():
        found.largest = max(found.largest, float(relative.max()))


def _common(other: Part, start: int, end: int) -> list[tuple[int, int]]:
    """Return what another part's spans have of a range."""
    if not _in_buckets(other):
        return [(start, end)]
    cut = ((max(start, a), min(end, b)) for a, b in other.spans)
    return [(a, b) for a, b in cut if a < b]


def _in_buckets(part: Part) -> bool:
    return part.name.endswith(".bucket_idx_*")


def _check_buckets(mine: list[Part], others: list[Part]) -> None:
    sizes = [
        {part.label: part.shape[0] for part in each if _in_buckets(part)} for each in (mine, others)
    ]
    if sizes[0] != sizes[1]:
        different = sorted(
            label for label in {*sizes[0], *sizes[1]} if sizes[0].get(label) != sizes[1].get(label)
        )
        label = different[0]
        raise ValueError(
            f"the checkpoints have different buckets: {label} has {sizes[0].get(label, 'no')} "
            f"elements in one and {sizes[1].get(label, 'no')} in the other ({len(different)} such "
            "buckets). dp_reshardable can be compared only with the same tensor, pipeline and "
            "expert parallel sizes and bucket size; save with --dist-ckpt-optim-fully-reshardable"
        )
