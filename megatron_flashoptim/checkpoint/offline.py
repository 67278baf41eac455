"""Conversion of checkpoints in model space between Megatron's Adam and flash, without a run.

The source is never touched. The result is written part by part beside its final place (``writer``),
read back, and moved into place in one step; what an interrupted conversion has finished is kept.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.validation import INTEGRITY_FNAME, save_integrity_manifest

from megatron_flashoptim.checkpoint import common_state, metadata, param_groups, workers, writer
from megatron_flashoptim.checkpoint.alone import alone
from megatron_flashoptim.checkpoint.damage import missing_or_short, read_metadata
from megatron_flashoptim.checkpoint.deviation import Report
from megatron_flashoptim.checkpoint.folder import ADAM, FLASH, CheckpointFolder, open_folder
from megatron_flashoptim.checkpoint.iterations import TRACKER, check_destination, check_release
from megatron_flashoptim.checkpoint.model_state import Chunk
from megatron_flashoptim.checkpoint.recoding import Recoding
from megatron_flashoptim.checkpoint.writer import NewBox
from megatron_flashoptim.codec.spec import ExpAvgSqCode, MasterBits
from megatron_flashoptim.optim.config import FlashOptimConfig
from megatron_flashoptim.optim.rules import RULES, rule_of

# Elements of a part: what an interruption loses, and what torch's writer holds until it is on disk.
_PART = 1 << 25
# Files of a checkpoint folder that are written anew.
_OWN_FILES = {".metadata", "metadata.json", "common.pt", INTEGRITY_FNAME}
# Bytes on disk beside an item's data: torch's archive around it.
_BYTES_PER_ITEM = 1400

Progress = Callable[[str, int, int], None]


class RequestError(ValueError):
    """What is asked for does not belong together, whatever is done to the checkpoints."""


@dataclass(frozen=True)
class Request:
    """What to convert.

    Attributes:
        source: folder of a checkpoint, or of one of its iterations.
        destination: folder that ``--load`` will be given.
        target: ``"flash"`` or ``"adam"``.
        iteration: of the source; by default its latest.
        optimizer: update rule of the new flash state; by default the source's.
        master_bits, exp_avg_sq_code: format of the new flash state; by default the source's, of
            Adam 24 and "sqrt".
        repair: rebuild masters that are not those of the weights, see ``deviation.belongs``.
        processes: that convert side by side.
    """

    source: Path
    destination: Path
    target: str
    iteration: int | None = None
    optimizer: str | None = None
    master_bits: MasterBits | None = None
    exp_avg_sq_code: ExpAvgSqCode | None = None
    repair: bool = False
    processes: int = 1


@dataclass(frozen=True)
class Result:
    """What was done.

    Attributes:
        folder: the new iteration.
        report: errors, and parameters that were repaired (``damaged``); None where an interrupted
            conversion had moved the result into place and removed its records.
        bytes_before, bytes_after: of all files of the iteration.
        resumed: parts that an interrupted conversion had finished already.
        parts: all of them.
        is_latest: whether the folder's tracker names it, and not a later iteration that was there.
    """

    folder: Path
    report: Report | None
    bytes_before: int
    bytes_after: int
    resumed: int
    parts: int
    is_latest: bool


class Conversion:
    """One conversion, planned when made; nothing is written before ``run``.

    Args:
        request: what to convert.

    Raises:
        RequestError: the update rule keeps no moment that the code is of.
        ValueError: the source is none that can be converted, or the destination is taken.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.folder = open_folder(request.source, request.iteration, checked=True)
        check_destination(request.destination, self.folder.path)
        self.final = request.destination / self.folder.name
        check_destination(self.final, self.folder.path)  # a destination that is SRC's own --save
        self.recoding = Recoding(self.folder, request.target, _flash_of(request, self.folder))
        self._check_request()
        self._named = "release" if self.folder.iteration is None else str(self.folder.iteration)
        if self.folder.iteration is None:
            check_release(request.destination)
        self._work = request.destination / f".converting-{self.folder.name}"
        self._new = self._work / "checkpoint"
        self._records = self._work / "records"
        self._described = self._work / "conversion.json"
        self._checked = self._work / "damaged.json"
        for taken, fits in (
            (request.destination, request.destination.is_dir()),
            (self.final, self._is_in_place()),
        ):
            if taken.exists() and not fits:
                raise _taken(taken)
        self.parts = list(self._parts())
        self.layout = writer.plan_parts(
            [[box for span in part for box in self.recoding.boxes(span)] for part in self.parts],
            self._byte_strings(),
        )

    def _check_request(self) -> None:
        request, folder = self.request, self.folder
        if folder.sharding_type == metadata.DP_RESHARDABLE:
            if folder.optimizer == FLASH:
                self.recoding.check_flash(repair=request.repair)
            if request.target == folder.optimizer == ADAM:
                raise ValueError(
                    f"{folder.path} is a checkpoint of Megatron's Adam already; what --repair "
                    "mends is not in dp_reshardable"
                )
            loads = ""
            if request.target == FLASH and self.recoding.keeps_moments:
                loads = (
                    f"--load it with --optimizer {self.recoding.flash.optimizer}, which converts "
                    "it while loading; or "
                )
            raise ValueError(
                f"{folder.path} has the sharding type dp_reshardable, in which only a run of the "
                f"same layout knows which element is whose: {loads}{metadata.RESAVE}"
            )
        self.recoding.check(repair=request.repair)
        self._common()  # for its ValueError: it is written after all tensors are looked at

    def _parts(self) -> Iterator[list[Any]]:
        part: list[Any] = []
        numel = 0
        for span in self.recoding.spans():
            if part and numel + span.numel > _PART:
                yield part
                part, numel = [], 0
            part.append(span)
            numel += span.numel
        yield part

    def _byte_strings(self) -> list[str]:
        return self.folder.reader.byte_strings()

    def bytes_of_result(self) -> int:
        """Return about how many bytes the result has on disk."""
        boxes = [box for part in self.parts for span in part for box in self.recoding.boxes(span)]
        return sum(box.box.numel() * box.dtype.itemsize + _BYTES_PER_ITEM for box in boxes)

    def boxes_of_key(self) -> dict[str, list[NewBox]]:
        """Return what will be written, by key of the new checkpoint."""
        found: dict[str, list[NewBox]] = {}
        for part in self.parts:
            for span in part:
                for box in self.recoding.boxes(span):
                    found.setdefault(box.key, []).append(box)
        return found

    def run(self, progress: Progress = lambda phase, done, total: None) -> Result:
        """Convert, verify, move the result into place and name it as the latest.

        Args:
            progress: is told the phase, and how many of its elements are done.

        Raises:
            ValueError: masters that are not those of the weights without ``repair``; too little
                disk space; an unfinished conversion of something else in the destination; a
                source that is damaged; a file that was not written as it should be. What is
                finished is kept then, for the same conversion to go on with, and the error says
                where; before any part is, nothing is left. Where the result is in place, the same
                conversion only ends what is left to do.
        """
        made = not self.request.destination.exists()
        before = bytes_of(self.folder.path)  # now: at the end it may be there no more
        try:
            with alone(self._work):
                resumed = len(self.parts)
                if not self._is_in_place():
                    self._begin()
                    resumed = sum(record is not None for record in self._all_records())
                    self._move_into_place(progress)
                with writer.writing(self.request.destination):
                    report = self._end()
        except BaseException:
            if made:
                with suppress(OSError):  # something is in it
                    self.request.destination.rmdir()
            raise
        return Result(
            folder=self.final,
            report=report,
            bytes_before=before,
            bytes_after=bytes_of(self.final),
            resumed=resumed,
            parts=len(self.parts),
            is_latest=(self.request.destination / TRACKER).read_text().strip() == self._named,
        )

    def _is_in_place(self) -> bool:
        """Return whether this conversion was interrupted with its result moved into place."""
        if not self.final.is_dir() or self._new.exists() or not self._described.is_file():
            return False
        return bool(writer.read_json(self._described) == self._identity())

    def _move_into_place(self, progress: Progress) -> None:
        """Convert, verify, and move the result into place.

        Raises:
            ValueError: as of ``run``.
        """
        try:
            self._convert_and_verify(progress)
            self._new.rename(self.final)
        except (ValueError, OSError, BrokenExecutor) as problem:
            said = str(problem).rstrip(".")
            if any(record is not None for record in self._all_records()):
                raise ValueError(
                    f"{said}. What is finished is kept in {self._work}: the same command goes "
                    "on with it; delete it if you do not"
                ) from problem
            shutil.rmtree(self._work)
            if isinstance(problem, BrokenExecutor):  # a process was killed, for its memory mostly
                raise ValueError(said) from problem
            raise

    def _convert_and_verify(self, progress: Progress) -> None:
        with workers.Pool(self._job(), self.request.processes) as pool:
            damaged = self._damaged(pool, progress)
            self._convert(pool, damaged, progress)
            finished = [record for record in self._all_records() if record is not None]
            assert len(finished) == len(self.parts)
            with writer.writing(self._new):
                self._finish_folder(finished)
            self._verify(pool, progress)

    def _begin(self) -> None:
        """Make the working folder, or check that the one there is this conversion's."""
        identity = self._identity()
        if self._described.is_file():
            if writer.read_json(self._described) != identity:
                raise ValueError(
                    f"{self._work} holds an unfinished conversion of another checkpoint, with "
                    "other options or of another release; remove it, or give another folder"
                )
            if self._new.is_dir():
                for number, plan in enumerate(self.layout.plans):
                    record = self._record(number)
                    if record is not None and not writer.is_whole(self._new, record, plan):
                        writer.forget_part(self._records, number)
                return
            shutil.rmtree(self._work)  # its result was moved into place, and is gone from there
        elif self.final.exists():
            raise _taken(self.final)  # another process was faster
        with writer.writing(self.request.destination):
            self._new.mkdir(parents=True, exist_ok=True)
            self._records.mkdir(exist_ok=True)
        needed, free = self.bytes_of_result(), shutil.disk_usage(self._work).free
        if needed > free:
            shutil.rmtree(self._work)
            raise ValueError(
                f"{self.request.destination} has {free / 1e9:.1f} GB free, the result needs "
                f"{needed / 1e9:.1f} GB"
            )
        writer.write_text(self._described, json.dumps(identity))

    def _identity(self) -> dict[str, Any]:
        from megatron_flashoptim import __version__

        described = (self.folder.path / ".metadata").read_bytes()
        return {
            "source": str(self.folder.path.resolve()),
            "source_metadata": hashlib.sha256(described).hexdigest(),
            "target": self.request.target,
            "flash": asdict(self.recoding.flash),
            "repair": self.request.repair,
            "release": __version__,
        }

    def _job(self) -> workers.Job:
        return workers.Job(self.folder.path, self.request.target, self.recoding.flash)

    def _record(self, number: int) -> writer.Record | None:
        return writer.read_record(self._records, number)

    def _all_records(self) -> list[writer.Record | None]:
        return [self._record(number) for number in range(len(self.parts))]

    def _damaged(self, pool: workers.Pool, progress: Progress) -> list[Chunk]:
        """Return the chunks whose masters are not those of the weights.

        Raises:
            ValueError: there are some, and they are not to be repaired.
        """
        path = self._checked
        chunks = self.recoding.chunks_to_check()
        numbers = writer.read_json(path)
        if numbers is None:
            total = sum(chunk.box.numel() for chunk in chunks)
            done, numbers = 0, []
            if chunks:
                progress("checking", done, total)
            for number, belongs in pool.check(chunks):
                done += chunks[number].box.numel()
                progress("checking", done, total)
                if not belongs:
                    numbers.append(number)
            writer.write_text(path, json.dumps(sorted(numbers)))
        damaged = [chunks[number] for number in sorted(numbers)]
        if damaged and not self.request.repair:
            Report(damaged=[chunk.name for chunk in damaged]).check()
        return damaged

    def _convert(self, pool: workers.Pool, damaged: Sequence[Chunk], progress: Progress) -> None:
        sizes = [sum(span.numel for span in part) for part in self.parts]
        left = [n for n in range(len(self.parts)) if self._record(n) is None]
        done = sum(sizes) - sum(sizes[number] for number in left)
        progress("converting", done, sum(sizes))
        common = common_state.as_bytes(self._common()) if self.has_common_key() else b""
        tasks = [
            workers.PartTask(
                number,
                self.layout.plans[number],
                self.parts[number],
                frozenset(damaged),
                self._new,
                self._records,
                common if number == len(self.parts) - 1 else b"",
            )
            for number in left
        ]
        for numel in pool.write(tasks):
            done += numel
            progress("converting", done, sum(sizes))

    def has_common_key(self) -> bool:
        """Return whether the common state is one of the byte strings."""
        return not common_state.is_file(self.folder)

    def _common(self) -> dict[str, Any]:
        if self.request.target == FLASH:
            return common_state.of_flash(
                self.folder,
                self.recoding.flash,
                self.recoding.described(),
                keeps_moments=self.recoding.keeps_moments,
            )
        return common_state.of_adam(self.folder)

    def _finish_folder(self, records: Sequence[writer.Record]) -> None:
        """Write what is no part: torch's metadata, Megatron's files, and others of the source."""
        writer.write_metadata(self._new, self.layout, records)
        writer.copy_contents(self.folder.path / "metadata.json", self._new / "metadata.json")
        if not self.has_common_key():
            common_state.write_file(self._new, self._common())
        for other in self.folder.path.iterdir():
            if other.name in _OWN_FILES or other.suffix == ".distcp":
                continue
            writer.copy_contents(other, self._new / other.name)

    def _verify(self, pool: workers.Pool, progress: Progress) -> None:
        """Read everything back, through the metadata just written."""
        if found := missing_or_short(self._new, read_metadata(self._new)):
            raise ValueError(f"{self._new} was not written as it should be: {found}")
        sizes = [sum(span.numel for span in part) for part in self.parts]
        done = 0
        progress("verifying", done, sum(sizes))
        for number in pool.verify(self._new, self._records, len(self.parts)):
            done += sizes[number]
            progress("verifying", done, sum(sizes))
        written = open_folder(self._new)
        if written.optimizer != self.request.target:
            raise ValueError(
                f"{self._new} was not written as a checkpoint of {self.request.target}"
            )
        if (self.folder.path / INTEGRITY_FNAME).is_file():
            save_integrity_manifest(str(self._new))

    def _report(self) -> Report | None:
        """Return the report of all parts, or None where records were removed."""
        report = Report()
        for record in self._all_records():
            if record is None:
                return None
            report.add(record.report)
        chunks = self.recoding.chunks_to_check()
        report.damaged = [chunks[number].name for number in writer.read_json(self._checked) or ()]
        return report

    def _end(self) -> Report | None:
        """Name the iteration in place as the latest, and remove the working folder.

        Whatever interrupts it, it can be called again, as long as the description is there.

        Returns:
            The report of all parts, or None where a call before has removed records.
        """
        tracker = self.request.destination / TRACKER
        before = tracker.read_text().strip() if tracker.is_file() else ""
        number = self.folder.iteration
        if number is None or not before.isdigit() or int(before) < number:
            writer.write_text(tracker, self._named)
        report = self._report()
        if self._records.is_dir():
            shutil.rmtree(self._records)
        self._checked.unlink(missing_ok=True)
        self._described.unlink()
        with suppress(OSError):  # it is empty, and the result is whole
            self._work.rmdir()
        return report


def _flash_of(request: Request, folder: CheckpointFolder) -> FlashOptimConfig:
    """Return rule and format of the new flash state; what is not asked for is as in the source.

    Raises:
        RequestError: the update rule keeps no moment that the code is of.
        ValueError: as of ``_optimizer_of``.
    """
    optimizer = request.optimizer or _optimizer_of(folder)
    saved = metadata.format_of(folder.flash)
    code = request.exp_avg_sq_code
    if not rule_of(optimizer).keeps_exp_avg_sq:
        if code is not None:
            raise RequestError(
                f"--exp-avg-sq-code {code} is of the second moment, and {optimizer} keeps none; "
                "drop the flag"
            )
        saved["exp_avg_sq_code"] = "sqrt"
    bits = request.master_bits or saved["master_bits"]
    return FlashOptimConfig(
        optimizer=optimizer,
        master_bits=bits,
        master_rounding="stochastic" if bits == 16 else "nearest",
        exp_avg_sq_code=code or saved["exp_avg_sq_code"],
    )


def _optimizer_of(folder: CheckpointFolder) -> str:
    """Return the update rule of a source's state, for Megatron's Adam that which steps alike.

    Raises:
        ValueError: it is of a rule that is not known here.
    """
    if folder.optimizer != FLASH:
        groups = param_groups.of_optimizer(folder.common.get("optimizer") or {})
        decoupled = param_groups.decoupled_by_adam(groups, folder.common.get("args"))
        return metadata.rule_of_adam(decoupled=decoupled is not False)
    name = metadata.optimizer_of(folder.flash)
    if name not in RULES:
        raise ValueError(
            f"{folder.path} is of the optimizer {name}, which this release does not know; it knows "
            f"{', '.join(RULES)}. --optimizer keeps the masters and starts the moments of one of "
            "these at zero; --to weights takes the masters alone"
        )
    return name


def bytes_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _taken(path: Path) -> ValueError:
    return ValueError(f"{path} is there already; remove it, or give another folder")
