"""The job scripts under a real Slurm: stopped in every way, training ends with the same bits.

They need root and Slurm (apt-get install --no-install-recommends slurm-wlm munge), and use a
cluster of their own on this machine. docs/slurm.md says what was seen.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from pretraining import LOSS, MODEL, data_flags, saved_tensors
from slurm_jobs import Cluster, Job

from megatron_flashoptim.megatron.cpu import MEGATRON_FLAGS

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        shutil.which("sbatch") is None or shutil.which("munged") is None,
        reason="needs Slurm: apt-get install --no-install-recommends slurm-wlm munge",
    ),
]
ITERATIONS = 80
SAVE_INTERVAL = 10


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    started = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    yield started
    started.stop()


def _variables(corpus: Path, save: Path, **more: str | int) -> dict[str, str | int | Path]:
    """Return those of pretrain.sh for the tests' model on CPU ranks."""
    model = [*MODEL, "--log-interval", "1", "--train-iters", str(ITERATIONS)]
    model += ["--optimizer", "flash_adamw", "--dist-ckpt-optim-fully-reshardable"]
    model += [*MEGATRON_FLAGS, *data_flags(corpus)]
    arguments = save.with_suffix(".args")
    arguments.write_text("\n".join(map(shlex.quote, model)))
    return {
        "SAVE": save,
        "ARGS_FILE": arguments,
        "SAVE_INTERVAL": SAVE_INTERVAL,
        "DEVICE": "cpu",
        "RDZV_HOST": "127.0.0.1",  # node0 is no name that this machine resolves
        "TIME": "1:00:00",
        **more,
    }


def _printed(log: str) -> dict[int, tuple[str, str]]:
    """Return loss and norm of the masters by iteration, of one start.

    For its second iteration Megatron prints the mean loss of both.
    """
    lines = {int(i): (loss, norm) for i, loss, norm in LOSS.findall(log)}
    return {i: ("" if i == min(lines) + 1 else loss, norm) for i, (loss, norm) in lines.items()}


def _check_that_test_showed_what_ran(job: Job, shown: str) -> None:
    """The last line of --test is the command that the job's first start ran on each node."""
    port = 20000 + int(job.number) % 10000
    expected = shown.splitlines()[-1].replace(":PORT ", f":{port} ")
    expected = expected.replace("JOB_ID", job.number).replace("RESTART_COUNT", "0")
    (ran,) = re.findall(r"(?m)^srun .* bash \S+/node\.sh (.*)$", job.starts()[0])
    assert ran == expected


def test_training_that_is_stopped_in_every_way_ends_with_the_same_bits(
    megatron: None, cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    one_node = _variables(corpus, tmp_path / "whole", RANKS_PER_NODE=2, RDZV_BACKEND="static")
    whole = cluster.submit("pretrain.sh", **one_node)
    whole.wait_for_state("COMPLETED")
    reference = _printed(whole.text())
    assert sorted(reference) == list(range(1, ITERATIONS + 1))

    save = tmp_path / "stopped"
    two_nodes = _variables(corpus, save, NODES=2, RANKS_PER_NODE=1, SBATCH_OPTIONS="--comment=a")
    shown = cluster.run_script("pretrain.sh", "--test", **two_nodes)
    job = cluster.submit("pretrain.sh", **two_nodes)
    # Preempted: Slurm sends SIGTERM and waits for Megatron to save at whatever iteration it is.
    job.wait_for_iteration(1, 13)
    assert "OverSubscribe=NO" in cluster.run("scontrol", "show", "job", job.number), "whole nodes"
    urgent = ("--partition", "urgent", "--nodes", "2", "--exclusive", "--output", "/dev/null")
    cluster.run("sbatch", *urgent, "--wrap", "sleep 1")
    # Warned as before the time limit, with SIGUSR1.
    job.wait_for_iteration(2, 33)
    cluster.run("scancel", "--signal", "USR1", job.number)
    # Crashed, after a checkpoint that makes another start worth it.
    job.wait_for_iteration(3, 54)
    job.kill_a_worker()
    # Requeued by an administrator.
    job.wait_for_iteration(4, 63)
    cluster.run("scontrol", "requeue", job.number)
    job.wait_for_state("COMPLETED")

    starts = job.starts()
    assert len(starts) == 5, job.text()
    for stopped in starts[:2]:
        assert "[exiting program after receiving SIGTERM.]" in stopped
        saved = re.findall(r"saved are (\d+) iterations\n.*: requeued", stopped)
        assert saved == [str(max(_printed(stopped)))], "saved at once, and requeued by the script"
    (saved,) = re.findall(r"exit code 1; saved are (\d+) iterations\n.*: requeued", starts[2])
    assert int(saved) % SAVE_INTERVAL == 0, "a crash saves nothing"
    assert "requeued" not in starts[3], "Slurm does that itself"
    for stopped, resumed in pairwise(starts):
        (saved,) = re.findall(r"successfully loaded checkpoint .* at iteration (\d+)", resumed)
        assert min(_printed(resumed)) == int(saved) + 1 <= max(_printed(stopped)) + 1
    assert "finished; the last checkpoint is that of iteration 80" in starts[-1]
    # Megatron's last rank prints, here on any of the two; on one node no line needs a number.
    assert set(re.findall(r"(?m)^(.*?) *\[.*\] iteration +\d+/", starts[0])) in ({"0:"}, {"1:"})
    assert not re.search(r"(?m)^\d+: ", whole.text())
    _check_that_test_showed_what_ran(job, shown)

    for start in starts:
        for iteration, (loss, norm) in _printed(start).items():
            expected_loss, expected_norm = reference[iteration]
            assert norm == expected_norm, iteration
            assert loss in ("", expected_loss) or not expected_loss, iteration
    _assert_same_tensors(save, tmp_path / "whole", ITERATIONS)
    _check_conversion_jobs(cluster, save, tmp_path)


def _assert_same_tensors(first: Path, second: Path, iteration: int) -> None:
    """Compare everything that two checkpoints hold, bit for bit."""
    one, other = (saved_tensors(save / f"iter_{iteration:07d}") for save in (first, second))
    assert one.keys() == other.keys()
    assert {key for key in one if key.startswith("optimizer.state.correction.")}
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype and tensor.shape == other[key].shape, key
        assert torch.equal(_bytes(tensor), _bytes(other[key])), key


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _check_conversion_jobs(cluster: Cluster, flash: Path, folder: Path) -> None:
    """To Adam and back is the identity, if both jobs do what they should; weights beside them."""
    settings = {"PROCESSES": 1, "MEMORY": "1G"}
    weights = cluster.submit(
        "convert.sh", SRC=flash, DST=folder / "weights", TO="weights", **settings
    )
    for source, target, to in ((flash, "adam", "adam"), (folder / "adam", "back", "flash")):
        job = cluster.submit("convert.sh", SRC=source, DST=folder / target, TO=to, **settings)
        job.wait_for_state("COMPLETED")
        assert "start 1: finished" in job.text()
    _assert_same_tensors(flash, folder / "back", ITERATIONS)
    weights.wait_for_state("COMPLETED")
    assert "start 1: finished" in weights.text()
    assert weights.log.parent == folder / "weights.logs"
    assert (folder / "weights" / "model.safetensors.index.json").is_file()


def test_jobs_that_are_cancelled_or_fail_at_once_are_not_started_again(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    setup = tmp_path / "setup.sh"
    setup.write_text("echo set up ${NOT_SET}\n")
    variables = _variables(corpus, tmp_path / "fails", NODES=2, RANKS_PER_NODE=1, RANK_LOGS="yes")
    variables |= {"SETUP": str(setup), "LOGS": str(tmp_path / "logs")}
    fails = cluster.submit("pretrain.sh", **variables, EXTRA_ARGS="--no-such-flag")
    variables = _variables(corpus, tmp_path / "cancelled", RANKS_PER_NODE=1)
    cancelled = cluster.submit("pretrain.sh", **variables)
    cancelled.wait_for_iteration(1, SAVE_INTERVAL + 1)
    cluster.run("scancel", cancelled.number)
    fails.wait_for_state("FAILED")
    assert "set up" in fails.text()
    assert "unrecognized arguments: --no-such-flag" in fails.text()
    assert "not requeued: exit code 2 says that its arguments are wrong" in fails.text()
    ranks = tmp_path / "logs" / f"ranks-{fails.number}-1"
    assert sorted(node.name for node in ranks.iterdir()) == ["node0-node0", "node1-node1"]
    errors = "".join(log.read_text() for log in ranks.glob("*/*/attempt_0/0/stderr.log"))
    assert "unrecognized arguments: --no-such-flag" in errors
    cancelled.wait_for(lambda: not cluster.run("squeue", "--noheader"), 60)
    assert cancelled.state() == "CANCELLED"
    assert len(cancelled.starts()) == 1
