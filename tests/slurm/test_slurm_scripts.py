"""The job scripts without Slurm: what --test prints, wrong variables, signals, the launcher."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from ranks import run_ranks
from slurm_jobs import ROOT, SCRIPTS


@pytest.fixture
def args_file(tmp_path: Path) -> Path:
    file = tmp_path / "model.args"
    file.write_text("--num-layers 2\n--optimizer flash_lion\n--save-interval 500\n")
    return file


def _run(
    script: str, *options: str, cwd: Path | None = None, **variables: object
) -> subprocess.CompletedProcess[str]:
    """Run a script with no other variables than these."""
    settings = {name: str(value) for name, value in variables.items()}
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, **settings}
    command = [str(SCRIPTS / script), *options]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def _shown(script: str, **variables: object) -> list[str]:
    """Return the commands that --test prints."""
    done = _run(script, "--test", **variables)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if not re.match(r"#|[A-Z_]+=", line)]


def test_pretraining_shows_what_it_would_run(args_file: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    extra = """--train-iters 8 --wandb-exp-name 'a b#3' --tag #1\n--layers "[0]*1\""""
    variables = {"SAVE": save, "ARGS_FILE": args_file, "EXTRA_ARGS": extra, "NODES": 3}
    submitted, step, command = _shown("pretrain.sh", **variables)
    assert submitted == (
        f"sbatch --parsable --job-name flash-pretrain --output {save}/logs/%x-%j.log "
        "--open-mode append --nodes 3 --ntasks-per-node 1 --time 4:00:00 --export ALL --requeue "
        "--signal USR1@300 --gpus-per-node=8 --exclusive --mem=0 "
        f"{SCRIPTS}/pretrain.sh --job {ROOT}"
    )
    assert step == (
        "srun --nodes 3 --ntasks 3 --ntasks-per-node 1 --cpu-bind none --kill-on-bad-exit=1 "
        f"--label bash {SCRIPTS}/node.sh ..."
    )
    expected = (
        f"{sys.executable} -m torch.distributed.run --nnodes 3 --nproc-per-node 8 "
        "--rdzv-backend c10d --rdzv-endpoint FIRST_NODE:PORT --rdzv-id JOB_ID-RESTART_COUNT "
        "--rdzv-conf join_timeout=900\\,read_timeout=900\\,timeout=900 "
        "-m megatron_flashoptim.run --device cuda "
        f"--finished {save}/.finished-JOB_ID {ROOT}/scripts/pretrain_gpt.py "
        f"@{args_file} --save {save} --load {save} "
        "--exit-signal-handler --exit-duration-in-mins 237 --train-iters 8 "
        "--wandb-exp-name a\\ b#3 --tag \\#1 --layers \\[0\\]\\*1"
    )
    assert command == expected
    assert not save.exists(), "nothing is made"

    # With checkpoints, nothing but those is loaded; without, LOAD is.
    (tmp_path / "other").mkdir()
    _, _, first = _shown("pretrain.sh", **variables, LOAD=tmp_path / "other")
    assert f"--load {tmp_path}/other --exit-signal-handler --exit-on-missing-checkpoint" in first
    save.mkdir()
    (save / "latest_checkpointed_iteration.txt").write_text("4\n")
    _, _, later = _shown("pretrain.sh", **variables, LOAD=tmp_path / "other")
    assert f"--load {save} --exit-signal-handler --exit-on-missing-checkpoint" in later


def test_containers_mount_what_the_job_reads_and_writes(args_file: Path, tmp_path: Path) -> None:
    image = {"CONTAINER": "image.sqsh", "CONTAINER_MOUNTS": "/data:/data", "PYTHON": ""}
    image["CONTAINER_ENV"] = "NCCL_DEBUG"
    save = tmp_path / "run"
    more, first = (tmp_path / name for name in ("more' 1.args", "first.args"))
    more.write_text("--bf16")
    first.write_text("--finetune")
    # Taken from the folder that the job is submitted in; one in the image may have any name.
    arguments = {
        "EXTRA_ARGS": "--a '' \"@more' 1.args\" @in/the/image",
        "FIRST_ARGS": "@first.args",
    }
    variables = {"SAVE": save, "ARGS_FILE": args_file, "RANK_LOGS": "yes", "LOGS": "/logs", **image}
    done = _run("pretrain.sh", "--test", cwd=tmp_path, **arguments, **variables)
    step, _, _, command = done.stdout.splitlines()[-4:]
    mounted = (ROOT, save, args_file, first, more, "/logs", "/data")
    mounts = "\\,".join(f"{path}:{path}".replace("' ", "\\'\\ ") for path in mounted)
    assert f" --container-image=image.sqsh --container-mounts={mounts} --container-env=" in step
    assert (
        "--container-env=CUDA_DEVICE_MAX_CONNECTIONS\\,OMP_NUM_THREADS\\,NCCL_DEBUG bash " in step
    )
    shown = f"--a '' @{tmp_path}/more\\'\\ 1.args @in/the/image @{first}"
    assert command.endswith(shown)
    # The job's starts read what was submitted, in whatever folder.
    passed = dict(re.findall(r"(?m)^(\w+_ARGS)=(.*)$", done.stdout))
    again = {name: shlex.split(value)[0] for name, value in passed.items()}
    _, _, command = _shown("pretrain.sh", **again, **variables)
    assert command.endswith(shown)
    assert command.startswith("python -m torch.distributed.run "), "the container's own"
    source, result = tmp_path, tmp_path / "result"
    submitted, command = _shown("convert.sh", SRC=source, DST=result, TO="flash", **image)
    assert "--nodes 1 --ntasks 1 --cpus-per-task 8 --mem 16G" in submitted
    mounts = (
        f"--container-mounts={ROOT}:{ROOT}\\,{source}:{source}\\,{result}:{result}\\,/data:/data"
    )
    assert command == (
        "srun --nodes 1 --ntasks 1 --cpus-per-task 8 --cpu-bind none "
        f"--container-image=image.sqsh {mounts} --container-env=NCCL_DEBUG "
        f"bash {SCRIPTS}/checkout.sh python -m megatron_flashoptim.cli "
        f"convert --to flash --processes 8 {source} {result}"
    )


# Slurm's commands as far as convert.sh needs them: the job runs at once, as what called it.
_SLURM = {
    "sbatch": """
        while [ "${1##*/}" != convert.sh ]; do
            if [ "$1" = --output ]; then log="$2"; fi
            shift
        done
        log="${log//%x/$JOB_NAME}"
        SLURM_JOB_ID=7 SLURM_JOB_NODELIST=here "$@" >"${log//%j/7}" 2>&1
        echo "7;cluster"
    """,
    "srun": 'while [ "$1" != bash ]; do shift; done; exec "$@"',
    "squeue": "echo RUNNING",
    "scontrol": 'echo "scontrol $*"',
}


@pytest.fixture
def slurm(tmp_path: Path) -> str:
    """Return a PATH with stand-ins for Slurm's commands."""
    folder = tmp_path / "slurm"
    _programs(folder, _SLURM)
    return f"{folder}:{os.environ['PATH']}"


def _programs(folder: Path, programs: dict[str, str]) -> None:
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)


def _job_log(**variables: object) -> tuple[Path, str]:
    """Submit convert.sh; returns what it says the log is, and that."""
    done = _run("convert.sh", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.fullmatch(r"job 7; its output goes to (.*)\n", done.stdout)
    assert found, done.stdout
    return Path(found[1]), Path(found[1]).read_text()


def test_a_job_converts_to_weights_with_the_default_logs(
    megatron: None, slurm: str, tmp_path: Path
) -> None:
    source, result = tmp_path / "release", tmp_path / "weights"
    source.mkdir()
    run_ranks(1, _save_adam, source)
    # A slash at the end would put a suffix into the folder.
    log, text = _job_log(PATH=slurm, SRC=source, DST=f"{result}/", TO="weights")
    assert "start 1: finished" in text, text
    assert log == tmp_path / "weights.logs" / "flash-convert-7.log"
    names = ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    assert sorted(file.name for file in result.iterdir()) == names


def _save_adam(folder: Path) -> None:
    from adam_checkpoints import FULLY, save

    save(folder, FULLY, 1, layers=1)


@pytest.mark.parametrize("target", ["flash", "adam", "weights"])
def test_a_stopped_conversion_starts_again_where_that_helps(
    target: str, slurm: str, tmp_path: Path
) -> None:
    _programs(tmp_path / "bin", {"stopped": "touch $DST/part; kill -s ${0##*/} $$"})
    for name in ("TERM", "KILL"):
        (tmp_path / "bin" / name).symlink_to("stopped")
    variables = {"PATH": slurm, "SRC": tmp_path, "DST": tmp_path / "result", "TO": target}
    goes_on = target != "weights"
    # Preempted before and after a part was finished, and killed for its memory.
    for name, code, part, again in (
        ("TERM", 143, True, True),
        ("TERM", 143, False, not goes_on),
        ("KILL", 137, True, goes_on),
    ):
        if part:
            (tmp_path / "result" / "part").unlink(missing_ok=True)
        log, text = _job_log(**variables, PYTHON=tmp_path / "bin" / name)
        assert f"start 1: ended with exit code {code}" in text
        assert ("start 1: requeued\nscontrol requeue 7\n" in text) == again
        log.unlink()  # it is one of the files in DST
    for requeue, says in (
        ("yes", f"requeued{' if it finished a part' * goes_on}, and"),
        ("no", "submitted again, it"),
    ):
        shown = _run("convert.sh", "--test", **variables, REQUEUE=requeue).stdout
        then = "goes on where it was" if goes_on else "writes the weights anew"
        assert f"by {'the limit or ' * goes_on}a preemption it is " in shown
        assert f"{says} {then}." in shown
        assert ("# At the limit it ends with nothing" in shown) != goes_on
        assert f"--output {log.parent}/%x-%j.log" in shown
        assert ("--signal TERM@60" in shown) == goes_on


def test_every_variable_has_a_comment_and_is_shown(args_file: Path, tmp_path: Path) -> None:
    for script, variables in (
        ("pretrain.sh", {"SAVE": tmp_path / "run", "ARGS_FILE": args_file}),
        ("convert.sh", {"SRC": tmp_path, "DST": tmp_path / "result", "TO": "adam"}),
    ):
        lines = (SCRIPTS / script).read_text().splitlines()
        top = lines[lines.index("set -a # the job gets the variables") : lines.index("set +a")]
        declared = []
        for above, line in pairwise(top):
            if found := re.match(r'([A-Z_]+)="\$\{\1:?-.*\}"(  *# .*)?$', line):
                declared.append(found[1])
                assert found[2] or above.startswith("# "), line
            else:
                assert not line or line.startswith("#"), line
        printed = _run(script, "--test", **variables).stdout
        assert re.findall(r"(?m)^([A-Z_]+)=", printed) == declared


def test_the_optimizer_is_that_of_the_arguments_unless_it_is_set(
    args_file: Path, tmp_path: Path
) -> None:
    variables = {"SAVE": tmp_path / "run", "ARGS_FILE": args_file}
    (*_, command) = _shown("pretrain.sh", **variables)
    assert "--optimizer" not in command and "--save-interval" not in command
    (*_, command) = _shown("pretrain.sh", **variables, OPTIMIZER="flash_adam", SAVE_INTERVAL="020")
    words = command.split()
    file, optimizer, interval, load = map(
        words.index, (f"@{args_file}", "--optimizer", "--save-interval", "--load")
    )
    assert file < optimizer < interval < load
    assert words[optimizer + 1] == "flash_adam" and words[interval + 1] == "20"

    args_file.write_text("--num-layers 2 # --optimizer flash_adamw\n")
    more = tmp_path / "more.args"
    more.write_text("--save-interval 7 --optimizer=adam")
    for given in (
        {"EXTRA_ARGS": "--save-interval=7 --optimizer adam"},
        {"EXTRA_ARGS": f"@{more}"},
        {"EXTRA_ARGS": "@in/the/image"},  # the launcher reads it, or says that it cannot
        {"EXTRA_ARGS": "--save-interval 7", "OPTIMIZER": "adam"},
    ):
        assert _run("pretrain.sh", "--test", **variables, **given).returncode == 0, given
    for given, missing in (
        ({}, "--optimizer"),
        ({"FIRST_ARGS": "--save-interval 7 --optimizer adam"}, "--optimizer"),
        ({"OPTIMIZER": "adam"}, "--save-interval"),
    ):
        done = _run("pretrain.sh", "--test", **variables, **given)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"error: no {missing} in ARGS_FILE or EXTRA_ARGS, and Megatron " in done.stderr


def test_whole_nodes_are_asked_for_beside_other_options(args_file: Path, tmp_path: Path) -> None:
    variables = {"SAVE": tmp_path / "run", "ARGS_FILE": args_file}
    options = "--partition gpu --comment 'a b'"
    submitted, _, _ = _shown("pretrain.sh", **variables, SBATCH_OPTIONS=options)
    assert " --gpus-per-node=8 --exclusive --mem=0 --partition gpu --comment a\\ b /" in submitted
    submitted, _, _ = _shown("pretrain.sh", **variables, SBATCH_OPTIONS="--mem=9G", WHOLE_NODES="")
    assert " --gpus-per-node=8 --mem=9G /" in submitted


def test_numbers_may_have_zeros_in_front(args_file: Path, tmp_path: Path) -> None:
    variables = {"SAVE": tmp_path / "run", "ARGS_FILE": args_file}
    numbers = {
        "NODES": "08",
        "RANKS_PER_NODE": "09",
        "WARNING_SECONDS": "0300",
        "RDZV_PORT": "029500",
    }
    shown = _shown("pretrain.sh", **variables, **numbers, RDZV_SECONDS="090")
    submitted, step, command = shown
    assert " --nodes 8 " in submitted and " --signal USR1@300 --gpus-per-node=9 " in submitted
    assert " --nodes 8 --ntasks 8 " in step
    assert " --nnodes 8 --nproc-per-node 9 " in command and ":29500 " in command
    assert "join_timeout=90\\," in command and " --exit-duration-in-mins 237" in command
    convert = {"SRC": tmp_path, "DST": tmp_path / "result", "TO": "flash", "PROCESSES": "08"}
    submitted, command = _shown("convert.sh", **convert)
    assert " --cpus-per-task 8 --mem 16G " in submitted and " --processes 8 " in command


@pytest.mark.parametrize("limit", ["UNLIMITED", "infinite", "0", "-1"])
def test_a_job_may_have_no_time_limit(limit: str, args_file: Path, tmp_path: Path) -> None:
    variables = {"SAVE": tmp_path / "run", "ARGS_FILE": args_file, "TIME": limit}
    submitted, _, command = _shown("pretrain.sh", **variables)
    assert f" --time {limit} " in submitted and "--exit-duration-in-mins" not in command
    convert = {"SRC": tmp_path, "DST": tmp_path / "result", "TO": "flash", "TIME": limit}
    assert f" --time {limit} " in _shown("convert.sh", **convert)[0]


WRONG = [
    ({"SAVE": ""}, "SAVE is empty: name the folder"),
    ({"ARGS_FILE": ""}, "ARGS_FILE is empty: name a file"),
    ({"ARGS_FILE": "/no/such"}, "ARGS_FILE='/no/such': no such file"),
    ({"NODES": "two"}, "NODES='two': must be a whole number of at least 1"),
    ({"RANKS_PER_NODE": "0"}, "RANKS_PER_NODE='0': must be a whole number of at least 1"),
    (
        {"RDZV_PORT": "80"},
        "RDZV_PORT='80': must be a whole number of at least 1024 and at most 65535",
    ),
    ({"RDZV_PORT": "99999"}, "RDZV_PORT='99999': must be a whole number of at least 1024 and at"),
    ({"WARNING_SECONDS": "08x"}, "WARNING_SECONDS='08x': must be a whole number of at least 1"),
    ({"RANK_LOGS": "all"}, "RANK_LOGS='all': must be one of: yes no"),
    ({"SAVE_INTERVAL": "0"}, "SAVE_INTERVAL='0': must be a whole number of at least 1"),
    ({"WHOLE_NODES": "--x 'y"}, "WHOLE_NODES: a quote is opened and not closed"),
    ({"RDZV_BACKEND": "etcd"}, "RDZV_BACKEND='etcd': must be one of: c10d static"),
    ({"TIME": "1 day"}, "TIME='1 day': give minutes"),
    ({"TIME": "5"}, "TIME='5' is not longer than WARNING_SECONDS='300'"),
    ({"PYTHON": "/no/such"}, "PYTHON='/no/such': no such interpreter"),
    ({"SCRIPT": "/no/such"}, "SCRIPT='/no/such': no such file"),
    ({"LOAD": "/no/such"}, "LOAD='/no/such': no such folder"),
    ({"EXTRA_ARGS": "--x 'y"}, "EXTRA_ARGS: a quote is opened and not closed"),
    ({"FIRST_ARGS": "--x 'y"}, "FIRST_ARGS: a quote is opened and not closed"),
    ({"RETRIES": "-1"}, "RETRIES='-1': must be a whole number of at least 0"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[next(iter(w)) for w, _ in WRONG])
def test_wrong_variables_are_told_in_one_line(
    args_file: Path, tmp_path: Path, wrong: dict[str, str], message: str
) -> None:
    variables = {"SAVE": tmp_path / "run", "ARGS_FILE": args_file, **wrong}
    done = _run("pretrain.sh", "--test", **variables)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"pretrain.sh: error: {message}")
    assert done.stderr.count("\n") == 1


def test_wrong_options_are_told_in_one_line(tmp_path: Path) -> None:
    for done, message in (
        (_run("pretrain.sh", "--help"), "'--help': give no option to submit the job, or --test"),
        (_run("convert.sh", SRC=tmp_path, DST=tmp_path, TO="fp8"), "TO='fp8': must be one of: "),
        (
            _run("convert.sh", SRC=tmp_path, DST=tmp_path, TO="weights", LOGS=tmp_path / "logs"),
            f"LOGS='{tmp_path}/logs': lies in DST, which must hold nothing but the weights; name",
        ),
        (_run("convert.sh", SRC="/no/such", DST=tmp_path, TO="adam"), "SRC='/no/such': no such"),
    ):
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


_WORKER = """
import signal, sys, time
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
# In one piece: torchrun starts workers with -u, and print would write the line's end apart.
sys.stdout.write("worker ready\\n")
while not stopped:
    time.sleep(0.05)
time.sleep(1)  # what a save takes
sys.stdout.write("worker saved\\n")
"""


def test_a_warning_reaches_the_workers_and_leaves_torchrun_alone(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(_WORKER)
    command = ["bash", str(SCRIPTS / "node.sh"), sys.executable, "-m", "torch.distributed.run"]
    command += ["--standalone", "--nproc-per-node", "2", str(worker)]
    node = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert node.stdout is not None
    lines: list[str] = []
    for line in _until_two(node.stdout, "worker ready"):
        lines.append(line)
    (torchrun,) = _children(node.pid)
    os.kill(torchrun, signal.SIGTERM)  # as from Slurm where it signals all processes of a job
    time.sleep(0.5)
    assert len(_children(torchrun)) == 2, "it would have ended its workers"
    os.kill(node.pid, signal.SIGUSR1)
    rest, _ = node.communicate(timeout=60)
    assert node.returncode == 0, rest
    assert "warned by Slurm; SIGTERM to workers" in rest
    assert rest.count("worker saved") == 2


def test_each_rank_has_a_log_of_its_own_where_that_is_asked_for(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("import sys; print('said'); print('warned', file=sys.stderr)")
    command = ["bash", str(SCRIPTS / "node.sh"), sys.executable, "-m", "torch.distributed.run"]
    command += ["--standalone", "--nproc-per-node", "2", str(worker)]
    own = {
        "SLURM_NODEID": "3",
        "SLURMD_NODENAME": "gpu7",
        "RANK_LOGS_FOLDER": str(tmp_path / "ranks"),
    }
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        for name, text in (("stdout", "said\n"), ("stderr", "warned\n")):
            (log,) = (tmp_path / "ranks" / "node3-gpu7").glob(f"*/attempt_0/{rank}/{name}.log")
            assert log.read_text().endswith(text)
            assert f"[default{rank}]:{text}" in (done.stdout if name == "stdout" else done.stderr)


def test_the_code_of_this_checkout_comes_first(tmp_path: Path) -> None:
    """Also in a container, where what an image sets stands instead of what the job has."""
    show = [
        sys.executable,
        "-c",
        "import megatron_flashoptim as m, sys; print(m.__file__, sys.path[2])",
    ]
    for path, second in ((str(tmp_path), str(tmp_path)), ("", None)):
        for script in ("checkout.sh", "node.sh"):
            done = subprocess.run(
                ["bash", str(SCRIPTS / script), *show],
                env={"PATH": os.environ["PATH"], "PYTHONPATH": path},
                cwd="/",
                capture_output=True,
                text=True,
            )
            file, then = done.stdout.split()
            assert file == str(ROOT / "megatron_flashoptim" / "__init__.py"), done.stderr
            assert second is None or then == second


def test_a_job_script_ignores_signals_once_its_command_has_ended() -> None:
    """Slurm signals it more than once; a trap that bash 5.2 runs in $(...) may end it."""
    script = """
        source "$0"
        code=0
        run_to_its_end bash -c 'kill -TERM $PPID; sleep 0.1; exit 3' || code=$?
        kill -USR1 $$
        kill -TERM $$
        echo "$code" "$(trap -p TERM USR1)"
    """
    command = ["bash", "-euo", "pipefail", "-c", script, str(SCRIPTS / "common.sh")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "3 trap -- '' SIGTERM\ntrap -- '' SIGUSR1\n", done.stderr


def _until_two(lines: Iterator[str], text: str) -> Iterator[str]:
    seen = 0
    for line in lines:
        yield line
        seen += line.count(text)
        if seen >= 2:
            return


def _children(process: int) -> list[int]:
    """Return the processes that a process has started and that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text()
        except OSError:
            continue  # it has ended
        if f"\nPPid:\t{process}\n" in status and "\nState:\tZ" not in status:
            found.append(int(folder.name))
    return found


def test_launcher_makes_the_file_only_where_the_script_returns(
    megatron: None, tmp_path: Path
) -> None:
    returns, exits = tmp_path / "returns.py", tmp_path / "exits.py"
    returns.write_text("")
    exits.write_text("raise SystemExit(0)")  # as Megatron does on a signal
    run_ranks(1, _launch, returns, tmp_path / "finished")
    run_ranks(1, _launch, exits, tmp_path / "stopped")
    assert (tmp_path / "finished").is_file()
    assert not (tmp_path / "stopped").exists()


def _launch(script: Path, finished: Path) -> None:
    from megatron_flashoptim import run

    try:
        run.main(["--finished", str(finished), str(script)])
    except SystemExit as ended:
        assert ended.code == 0, ended
