"""A real Slurm on this machine, and jobs that the project's scripts submit to it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts" / "slurm"


class Cluster:
    """Slurm of ``scripts/slurm/local_cluster.sh``: nodes node0 and node1, partitions train, urgent.

    Args:
        folder: for its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._script("start")

    def stop(self) -> None:
        """End every job and the cluster."""
        self._script("stop")

    def _script(self, action: str) -> None:
        # Not captured: the daemons that it starts would keep a pipe open.
        with open(self.folder.with_suffix(f".{action}"), "w+") as output:
            command = [str(SCRIPTS / "local_cluster.sh"), action, str(self.folder)]
            done = subprocess.run(command, stdout=output, stderr=output)
            output.seek(0)
            assert done.returncode == 0, output.read()

    def run(self, *command: str) -> str:
        """Return what a command of Slurm prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def run_script(self, script: str, *options: str, **variables: str | int | Path) -> str:
        """Return what one of the job scripts prints."""
        settings = {name: str(value) for name, value in variables.items()}
        done = subprocess.run(
            [str(SCRIPTS / script), *options],
            env={**self.environment, "PYTHON": sys.executable, **settings},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, script: str, **variables: str | int | Path) -> Job:
        """Submit a job with one of the job scripts."""
        printed = self.run_script(script, **variables)
        found = re.fullmatch(r"job (\d+); its output goes to (.*)\n", printed)
        assert found, printed
        return Job(self, found[1], Path(found[2]))


class Job:
    """A job and its log, which all of its starts share."""

    def __init__(self, cluster: Cluster, number: str, log: Path) -> None:
        self.cluster = cluster
        self.number = number
        self.log = log

    def text(self) -> str:
        """Return its log so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def starts(self) -> list[str]:
        """Return the log of each start."""
        parts = re.split(r"(?m)^(?=.* start \d+: on )", self.text())
        return [part for part in parts if part.strip()]

    def state(self) -> str:
        """Return its state in Slurm's words."""
        shown = self.cluster.run("scontrol", "show", "job", self.number)
        found = re.search(r"JobState=(\S+)", shown)
        assert found, shown
        return found[1]

    def wait_for(self, what: Callable[[], object], seconds: float) -> None:
        """Wait until something is true; fails with the log where it takes too long."""
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"{self.state()}\n{self.text()[-6000:]}"
            time.sleep(0.1)

    def wait_for_iteration(self, start: int, iteration: int, seconds: float = 240) -> None:
        """Wait until a start of the job, counted from 1, has trained an iteration."""

        def reached() -> bool:
            starts = self.starts()
            done = (
                re.findall(r"iteration +(\d+)/ ", starts[start - 1]) if start <= len(starts) else []
            )
            return bool(done) and int(done[-1]) >= iteration

        self.wait_for(reached, seconds)

    def wait_for_state(self, state: str, seconds: float = 240) -> None:
        """Wait until it is in a state."""
        self.wait_for(lambda: self.state() == state, seconds)

    def kill_a_worker(self) -> None:
        """End one of its training processes with SIGKILL, as a crash does."""
        for process, command in _processes():
            of_this_job = f".finished-{self.number}\0" in command
            if of_this_job and "torch.distributed.run" not in command and "srun" not in command:
                os.kill(process, signal.SIGKILL)
                return
        raise AssertionError("no worker is running")


def _processes() -> Iterator[tuple[int, str]]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            yield int(folder.name), (folder / "cmdline").read_text(errors="replace")
        except OSError:
            continue  # it has ended
