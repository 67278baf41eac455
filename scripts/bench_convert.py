#!/usr/bin/env python3
"""Time and weigh ``megatron-flashoptim convert`` on a checkpoint.

    torchrun --nproc-per-node 1 scripts/bench_checkpoint.py --device cpu --layers 12 \\
        --hidden 1024 --heads 16 --vocab 50304 --optimizers adam --formats fully_reshardable \\
        --repeats 1 --no-warm-up --folder /tmp/adam --keep
    python scripts/bench_convert.py /tmp/adam/checkpoint --processes 1 2 --json convert.json

converts the Adam checkpoint to flash, that to Adam again, and that to fp32 weights, each in a
process of its own, and prints seconds, bytes read and written, and the peak of proportional memory
(PSS) of the process and its children together: private pages, and its share of shared ones. What
is written is read back and compared by the command itself, in the time given.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
# What the console script runs; the package need not be installed.
COMMAND = (sys.executable, "-c", "from megatron_flashoptim.cli import main; exit(main())")


@dataclass(frozen=True)
class Row:
    """One conversion; times in seconds, sizes in bytes."""

    target: str
    processes: int
    seconds: float
    read_bytes: int
    written_bytes: int
    peak_bytes: int


def convert(target: str, source: Path, destination: Path, processes: int) -> Row:
    """Convert in a process of its own and watch its memory.

    Raises:
        SystemExit: the command failed; its own error is on stderr.
    """
    command = [*COMMAND, "convert", "--to", target, str(source), str(destination)]
    if target != "weights":
        command += ["--processes", str(processes)]
    started = time.monotonic()
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, _memory(root))
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return Row(
        target=target,
        processes=processes,
        seconds=time.monotonic() - started,
        read_bytes=_size(source),
        written_bytes=_size(destination),
        peak_bytes=peak,
    )


def _memory(root: psutil.Process) -> int:
    """Return the proportional memory of a process and its children."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue  # it has just ended
    return total


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def table(rows: list[Row]) -> str:
    """Return the rows as a table, sizes in MB (10^6 bytes)."""
    lines = [
        f"{'to':8} {'processes':>9} {'s':>8} {'read MB':>10} {'written MB':>10} {'peak MB':>8}"
        f" {'MB/s':>7}"
    ]
    for row in rows:
        lines.append(
            f"{row.target:8} {row.processes:9d} {row.seconds:8.1f} {row.read_bytes / 1e6:10.1f} "
            f"{row.written_bytes / 1e6:10.1f} {row.peak_bytes / 1e6:8.0f} "
            f"{row.read_bytes / 1e6 / row.seconds:7.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a checkpoint of Megatron's Adam")
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    rows = []
    for processes in options.processes:
        with tempfile.TemporaryDirectory(prefix="bench_convert_") as folder:
            work = Path(folder)
            rows.append(convert("flash", options.source, work / "flash", processes))
            rows.append(convert("adam", work / "flash", work / "adam", processes))
            shutil.rmtree(work / "adam")
            if processes == options.processes[0]:
                rows.append(convert("weights", work / "flash", work / "weights", 1))
    print(table(rows))
    if options.json:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
        packages = ("torch", "megatron-core")
        environment = {
            "machine": f"{platform.machine()}, {psutil.cpu_count()} cores",
            "commit": commit or "unknown",
            **{name: importlib.metadata.version(name) for name in packages},
        }
        found = {"environment": environment, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
