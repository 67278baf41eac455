"""Every start of a job of pretrain.sh: its arguments, whether another one follows, its cache.

Slurm's commands are stood in for here, and where the decision alone is tested the training too: by
one that writes what Megatron notes after a save, and ends. test_slurm_cluster.py has the real ones.
"""

from __future__ import annotations

import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_jobs import ROOT, SCRIPTS
from test_argument_files import LINES

from megatron_flashoptim.cli.argument_files import read_arguments

_COMMANDS = {
    # srun runs what each node would, node.sh, and squeue answers questions for time and state.
    "srun": 'while [ "$1" != bash ]; do shift; done; exec "$@"',
    "squeue": """
        if [ "${!#}" != %T ]; then echo 1:00:00; exit; fi
        if [ -n "${FAILS:-}" ]; then echo >>"$FAILS"; [ "$(wc -l <"$FAILS")" -gt "$MOST" ]; fi
        echo "$STATE"
    """,
    "scontrol": """
        if [ "$1" = show ]; then echo 127.0.0.1; exit; fi
        if [ -n "${FAILS:-}" ]; then echo >>"$FAILS"; [ "$(wc -l <"$FAILS")" -gt "$MORE" ]; fi
        echo "$*" >>"$REQUEUED"
    """,
    "sleep": "",
    "training": """
        if [ -n "$SAVED" ]; then echo "$SAVED" >"$SAVE/latest_checkpointed_iteration.txt"; fi
        if [ "$CODE" = finished ]; then touch "$SAVE/.finished-$SLURM_JOB_ID"; exit 0; fi
        exit "$CODE"
    """,
}


class Starts:
    """The starts of one job; each adds to its log."""

    def __init__(self, folder: Path, **variables: str | int | Path) -> None:
        self.save = folder / "run"
        self.log = folder / "job.log"
        self.requeued = folder / "requeued"
        self.count = 0
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        for name, lines in _COMMANDS.items():
            command = bin_folder / name
            command.write_text(f"#!/usr/bin/env bash\nset -e\n{lines}\n")
            command.chmod(0o755)
        arguments = folder / "model.args"
        arguments.write_text("--optimizer adam --save-interval 1  # not --finetune\n")
        settings = {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "PYTHON": bin_folder / "training",
            "SAVE": self.save,
            "ARGS_FILE": arguments,
            "REQUEUED": self.requeued,
            "SLURM_JOB_ID": 7,
            "SLURM_JOB_NODELIST": "node0",
            "STATE": "RUNNING",
            "DEVICE": "cpu",
            "RANKS_PER_NODE": 1,
            "TMPDIR": folder,
            **variables,
        }
        self.environment = {name: str(value) for name, value in settings.items()}

    def start(self, saved: int | str = "", code: int | str = 1, **variables: str) -> str:
        """Run one start; return the last line it logs.

        Args:
            saved: what the training notes as its newest checkpoint; empty: it saves none.
            code: its exit code, or ``finished``.
        """
        self.environment |= {"SAVED": str(saved), "CODE": str(code), **variables}
        if self.count:
            self.environment["SLURM_RESTART_COUNT"] = str(self.count)
        self.count += 1
        command = [str(SCRIPTS / "pretrain.sh"), "--job", str(ROOT)]
        with open(self.log, "a") as log:
            done = subprocess.run(command, env=self.environment, stdout=log, stderr=log)
        assert done.returncode == (0 if code == "finished" else int(code) or 1)
        last = self.log.read_text().splitlines()[-1]
        return last.partition(f" start {self.count}: ")[2] or last

    def requeues(self) -> int:
        """Return how often the job was requeued."""
        return len(self.requeued.read_text().splitlines()) if self.requeued.exists() else 0


def test_starts_that_save_nothing_are_tried_again_a_few_times_in_a_row(tmp_path: Path) -> None:
    job = Starts(tmp_path, RETRIES=1)
    # Each start but the last one: a crash before the first save, then one after it, and so on.
    for saved in ("", 9, "", 10, ""):
        assert job.start(saved) == "requeued"
    assert job.start() == "not requeued: no checkpoint since this start, and RETRIES=1"
    assert job.requeues() == 5
    # An administrator who requeues it then gets as many tries again.
    assert job.start() == "requeued"
    assert job.start(code="finished") == "finished; the last checkpoint is that of iteration 10"
    assert sorted(path.name for path in job.save.rglob("*")) == [
        "latest_checkpointed_iteration.txt",
        "logs",
    ]


def test_starts_that_slurm_ends_are_no_tries(tmp_path: Path) -> None:
    job = Starts(tmp_path, RETRIES=1)
    for state in ("COMPLETING", "PREEMPTED"):
        assert job.start(STATE=state) == f"left to Slurm: the job is {state}"
    assert job.start(STATE="RUNNING", REQUEUE="no") == "not requeued: REQUEUE=no"
    assert job.start(REQUEUE="yes") == "requeued"
    # A start that ended with its node, after a save: nothing was left to count or to decide.
    (job.save / "latest_checkpointed_iteration.txt").write_text("3\n")
    assert job.start() == "requeued"
    job = Starts(_folder(tmp_path / "none"), RETRIES=0)
    assert job.start(code=0) == "not requeued: no checkpoint since this start, and RETRIES=0"


def test_slurm_is_asked_again_while_it_does_not_answer(tmp_path: Path) -> None:
    job = Starts(tmp_path, FAILS=tmp_path / "asked", MOST=5, MORE=8)
    assert job.start(10) == "requeued" and job.requeues() == 1
    assert (tmp_path / "asked").read_text().count("\n") == 9, "five and two failed"
    for saved, most, told in ((20, "99", "Slurm did not answer"), (30, "0", "scontrol failed")):
        (tmp_path / "asked").unlink()
        last = job.start(saved, code=0, MOST=most, MORE="99")  # stopped, and ended well
        assert last == f"not requeued: {told} for ten minutes"
    assert job.requeues() == 1


def test_two_jobs_do_not_train_into_one_folder(tmp_path: Path) -> None:
    job = Starts(tmp_path)
    assert job.start(10) == job.start(20) == "requeued"
    refused = f"SAVE='{job.save}': job 7 is RUNNING and trains into it; cancel one of the two jobs"
    assert job.start(30, code=2, SLURM_JOB_ID="8") == f"pretrain.sh: error: {refused}"
    note = job.save / "latest_checkpointed_iteration.txt"
    assert note.read_text() == "20\n" and job.requeues() == 2
    # The other one has ended, or waits; then that one is refused.
    assert job.start(30, STATE="PENDING") == "left to Slurm: the job is PENDING"
    last = job.start(40, code=2, SLURM_JOB_ID="7", STATE="RUNNING")
    assert last.endswith("job 8 is RUNNING and trains into it; cancel one of the two jobs")
    assert note.read_text() == "30\n"
    assert (job.save / ".job").read_text() == "8\n"
    assert sorted(job.save.glob(".*")) == [job.save / ".job"]


def test_setup_decides_nothing_but_the_environment_of_the_training(tmp_path: Path) -> None:
    setup = tmp_path / "setup.sh"
    job = Starts(tmp_path, SETUP=setup, RETRIES=9)
    setup.write_text("code=0; before=99; after=x; left=y; export SAVED=7; echo $NOT_SET\n")
    assert job.start() == "requeued"
    assert (
        "start 1: ended before training did, with exit code 1; saved are 7" in job.log.read_text()
    )
    # What it loads may be missing on one node, at one time.
    for line, code in (("false", 1), ("[ -f /no ] && . /no", 1), ("exit 3", 3), ("exit", 0)):
        setup.write_text(f"{line}\n")
        assert job.start(code=code) == "requeued"
        assert f"start {job.count}: SETUP ended the start, with exit code {code}\n" in (
            job.log.read_text()
        )
    assert job.requeues() == 5


def test_a_start_that_goes_back_is_the_last_one(tmp_path: Path) -> None:
    job = Starts(tmp_path)
    assert job.start(10) == "requeued"
    told = "not requeued: the newest checkpoint was that of iteration 10, and is now that of "
    assert job.start(9) == told + "iteration 9"
    job = Starts(_folder(tmp_path / "release"), RETRIES=0)
    assert job.start("release") == job.start(1) == "requeued", "iteration 0 to Megatron"


@pytest.mark.parametrize(
    ("noted", "message"),
    [
        ("", "holds '', which is no iteration: "),
        (None, "Is a directory: SAVE may have checkpoints"),
    ],
)
def test_a_note_of_the_newest_checkpoint_that_cannot_be_read_is_not_taken_for_none(
    noted: str | None, message: str, tmp_path: Path
) -> None:
    note = tmp_path / "run" / "latest_checkpointed_iteration.txt"
    first = {"LOAD": tmp_path, "FIRST_ARGS": "--finetune"}
    job = Starts(tmp_path, **first)
    assert job.start(5000) == "requeued"
    note.unlink()
    if noted is None:
        note.mkdir()
    else:
        note.write_text(noted)  # the node failed while it was written
    command, error = _test(tmp_path, **first)
    assert not command and error.count("\n") == 1 and message in error
    assert message in job.start(code=2)
    assert job.requeues() == 1
    for works in ("5000", "release\n"):
        if noted is not None:
            note.write_text(works)
            assert f"--load {note.parent} " in _test(tmp_path, **first)[0]


def test_wrong_arguments_end_the_job_at_once(tmp_path: Path) -> None:
    """With the real torchrun and launcher, which is given a file that is not there."""
    job = Starts(tmp_path, PYTHON=sys.executable, EXTRA_ARGS="@missing.args")
    told = "not requeued: exit code 2 says that its arguments are wrong, as they would be again"
    assert job.start() == told
    assert "cannot read the file of arguments missing.args" in job.log.read_text()
    # On a later start it may be one node that could not read them.
    assert job.start() == "requeued"
    # What was in the log before is no report of this start.
    other = Starts(_folder(tmp_path / "other"))
    other.log.write_text(job.log.read_text())
    assert other.start() == "requeued"


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _test(
    tmp_path: Path, arguments: str = "", whole: bool = False, **variables: object
) -> tuple[str, str]:
    """Return the command of each node that --test shows, or all that it shows, and the error."""
    file = tmp_path / "model.args"
    file.write_text(f"--optimizer adam --save-interval 1\n{arguments}\n")
    settings = {"SAVE": tmp_path / "run", "ARGS_FILE": file, "PYTHON": sys.executable, **variables}
    done = subprocess.run(
        [str(SCRIPTS / "pretrain.sh"), "--test"],
        env={"PATH": os.environ["PATH"], **{name: str(value) for name, value in settings.items()}},
        capture_output=True,
        text=True,
    )
    assert done.returncode == (2 if done.stderr else 0)
    return done.stdout if whole else (done.stdout.splitlines() or [""])[-1], done.stderr


def test_nodes_wait_for_the_first_ones_store_as_long_as_for_each_other(tmp_path: Path) -> None:
    """torch's c10d store has a timeout of its own, of a minute if none is given."""
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
    from torch.distributed.elastic.rendezvous.utils import _parse_rendezvous_config

    command, _ = _test(tmp_path, RDZV_SECONDS=321)
    words = shlex.split(command)
    given = _parse_rendezvous_config(words[words.index("--rdzv-conf") + 1])
    _, store = create_backend(RendezvousParameters("c10d", "localhost:0", "id", 1, 1, **given))
    assert store.timeout.total_seconds() == 321
    assert given["join_timeout"] == given["timeout"] == "321"


def test_first_arguments_are_given_while_there_is_no_checkpoint(tmp_path: Path) -> None:
    # Those of each start: a schedule may change, a comment and a value may hold anything.
    always = "--override-opt_param-scheduler --wandb-exp-name=--finetune"
    file = "--name 'a --finetune' # --ckpt-step 4\n#--no-load-rng\n--load /other --bf16#--finetune"
    variables = {"EXTRA_ARGS": always, "LOAD": tmp_path, "FIRST_ARGS": "--finetune --x 'a b'"}
    command, error = _test(tmp_path, file, **variables)
    assert not error
    assert f"--load {tmp_path} " in command
    assert command.endswith(f" 237 {always} --finetune --x a\\ b")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("4\n")
    command, error = _test(tmp_path, file, **variables)
    assert not error
    assert f"--load {tmp_path}/run " in command
    assert command.endswith(f" 237 {always}")


def test_a_training_goes_on_without_the_folder_that_it_began_from(tmp_path: Path) -> None:
    load = _folder(tmp_path / "adam")
    variables = {"LOAD": load, "CONTAINER": "image.sqsh"}
    assert f"--load {load} " in _test(tmp_path, **variables)[0]
    load.rmdir()
    assert f"error: LOAD='{load}': no such folder" in _test(tmp_path, **variables)[1]
    _folder(tmp_path / "run").joinpath("latest_checkpointed_iteration.txt").write_text("4\n")
    shown, error = _test(tmp_path, whole=True, **variables)
    assert not error and f"--load {tmp_path}/run " in shown
    assert f"{load}:{load}" not in shown, "pyxis mounts no folder that is missing"


OPEN = "line 2: a quote is not closed, or a backslash ends the line"
ONCE = "would be repeated by every start, also those that resume from SAVE: give it in FIRST_ARGS"


@pytest.mark.parametrize(
    ("arguments", "extra", "message"),
    [
        ("", "--lr 1 --finetune", f"EXTRA_ARGS: --finetune {ONCE}"),
        ("", "--ckpt-step=4", f"EXTRA_ARGS: --ckpt-step {ONCE}"),
        ("", "@{}/more.args", f"EXTRA_ARGS: @{{}}/more.args: --no-load-rng {ONCE}"),
        ("\t'--no-load-optim' # why\n", "", f"ARGS_FILE='{{}}/model.args': --no-load-optim {ONCE}"),
        ("--moe-use-upcycling", "", f"ARGS_FILE='{{}}/model.args': --moe-use-upcycling {ONCE}"),
        ("--ckpt-step 4\r", "", f"ARGS_FILE='{{}}/model.args': --ckpt-step {ONCE}"),
        ("--x 'y", "", f"{{}}/model.args, {OPEN}: 'y"),
        ("--x y\\\r", "", f"{{}}/model.args, {OPEN}: \\"),
        ("", "--load /other", "EXTRA_ARGS: --load would stand instead of this script's: set SAVE"),
    ],
)
def test_arguments_of_every_start_must_let_it_resume(
    tmp_path: Path, arguments: str, extra: str, message: str
) -> None:
    (tmp_path / "more.args").write_text("# --finetune\n--bf16\n--no-load-rng")
    command, error = _test(tmp_path, arguments, EXTRA_ARGS=extra.format(tmp_path))
    assert error.startswith(f"pretrain.sh: error: {message.format(tmp_path)}")
    assert not command and error.count("\n") == 1


def test_files_are_read_as_the_launcher_reads_them(tmp_path: Path) -> None:
    generator = random.Random(0)
    lines = list(LINES)
    for _ in range(1000):
        line = "".join(generator.choices("ab#'\"\\ \t-=@$*[&", k=generator.randrange(14)))
        one = tmp_path / "one.args"
        one.write_text(line)
        try:
            read_arguments(one)
        except ValueError:
            continue  # an open quote
        lines.append(line)
    assert len(lines) > 400
    for ending in ("\n", "\r\n"):
        file = tmp_path / "all.args"
        file.write_bytes(ending.join(lines).encode())
        command = 'source "$0" && read_words "$1" && printf "%s\\0" "${WORDS[@]}"'
        read = subprocess.run(
            ["bash", "-euc", command, str(SCRIPTS / "common.sh"), str(file)], capture_output=True
        )
        assert read.returncode == 0, read.stderr
        assert read.stdout.decode().split("\0")[:-1] == read_arguments(file)


def test_the_cache_of_triton_is_on_the_node_and_of_one_start(tmp_path: Path) -> None:
    show = 'echo "${TRITON_CACHE_DIR:-none}"; cd "${TRITON_CACHE_DIR:?}" && stat -c %a . && ls'
    job = f"test{os.getpid()}"

    def shown(**variables: object) -> list[str]:
        settings = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": job, "SLURM_NODEID": 1, **variables}
        command = ["bash", str(SCRIPTS / "node.sh"), "bash", "-c", show]
        environment = {name: str(value) for name, value in settings.items()}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True
        ).stdout.splitlines()

    cache = tmp_path / f"triton-{job}-1"
    cache.mkdir()
    (cache / "damaged").touch()  # a killed start leaves it
    assert shown(TMPDIR=tmp_path) == [str(cache), "700"]
    assert not cache.exists()
    # In a container the node's TMPDIR may be missing.
    assert shown(TMPDIR=tmp_path / "missing") == shown() == [f"/tmp/triton-{job}-1", "700"]
    # What another user could have put there is not used, and what is chosen is kept.
    mine = _folder(tmp_path / "mine")
    (mine / "kernel").touch()
    cache.symlink_to(mine)
    assert shown(TMPDIR=tmp_path) == ["none"]
    assert shown(TRITON_CACHE_DIR=mine)[::2] == [str(mine), "kernel"]
    assert (mine / "kernel").exists()
