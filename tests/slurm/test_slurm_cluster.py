"""The job scripts under a real Slurm: stopped in every way, training ends with the same bits.

They need root and Slurm (apt-get install --no-install-recommends slurm-wlm munge), and use a
cluster of their own on this machine. docs/slurm.md says what was seen.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from slurm_jobs import ROOT, SCRIPTS, Cluster, Job
from pretraining import LOSS, MODEL, data_flags, saved_tensors

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
EARLIER_NORM = re.compile(r"iteration +(\d+)/.*?params norm: ([\d.E+-]+)")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    started = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    yield started
    started.stop()


def _pretrain(cluster: Cluster, corpus: Path, save: Path, **variables: str | int) -> Job:
    """Submit a training of the tests' model on two CPU ranks."""
    arguments = save.with_suffix(".args")
    model = [*MODEL, "--log-interval", "1", "--train-iters", str(ITERATIONS)]
    arguments.write_text(
        "\n".join(map(shlex.quote, [*model, *MEGATRON_FLAGS, *data_flags(corpus)]))
    )
    return cluster.submit(
        "pretrain.sh",
        SAVE=save,
        ARGS_FILE=arguments,
        SAVE_INTERVAL=SAVE_INTERVAL,
        DEVICE="cpu",
        RDZV_HOST="127.0.0.1",  # node0 is no name that this machine resolves
        TIME="1:00:00",
        **variables,
    )


def _printed(log: str) -> dict[int, tuple[str, str]]:
    """Return loss and norm of the masters by iteration, of one start.

    Of its second iteration Megatron prints the mean loss of both.
    """
    lines = {int(i): (loss, norm) for i, loss, norm in LOSS.findall(log)}
    second = sorted(lines)[1]
    return {i: ("" if i == second else loss, norm) for i, (loss, norm) in lines.items()}


def test_training_that_is_preempted_requeued_and_killed_ends_with_the_same_bits(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    whole = _pretrain(cluster, corpus, tmp_path / "whole", RANKS_PER_NODE=2, RDZV_BACKEND="static")
    whole.wait_for_state("COMPLETED")
    reference = _printed(whole.text())
    assert sorted(reference) == list(range(1, ITERATIONS + 1))

    save = tmp_path / "stopped"
    job = _pretrain(cluster, corpus, save, NODES=2, RANKS_PER_NODE=1)

    # Preempted: Slurm sends SIGTERM and waits; Megatron saves at whatever iteration it is.
    job.wait_for_iteration(1, 13)
    urgent = ["--partition", "urgent", "--nodes", "2", "--exclusive", "--output", "/dev/null"]
    cluster.run("sbatch", *urgent, "--wrap", "sleep 1")
    # Warned, as before the time limit: SIGUSR1.
    job.wait_for_iteration(2, 33)
    cluster.run("scancel", "--signal", "USR1", job.number)
    # Killed without a warning; a checkpoint was saved meanwhile, so that it is worth a new start.
    job.wait_for_iteration(3, 54)
    job.kill_a_worker()
    # Requeued by an administrator.
    job.wait_for_iteration(4, 63)
    cluster.run("scontrol", "requeue", job.number)
    job.wait_for_state("COMPLETED")
    print(job.text())
