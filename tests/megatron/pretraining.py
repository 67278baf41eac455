"""Megatron's own training loop under the launcher, on forked ranks: a run takes seconds."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from ranks import run_ranks

from megatron_flashoptim.megatron import cpu

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "pretrain_gpt.py"
MODEL = """--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64
--max-position-embeddings 64 --position-embedding-type rope --micro-batch-size 2
--global-batch-size 4 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-decay-iters 8
--weight-decay 0.1 --clip-grad 1.0 --adam-beta2 0.95 --bf16 --use-distributed-optimizer
--attention-dropout 0 --hidden-dropout 0 --tokenizer-type NullTokenizer --vocab-size 257
--eval-iters 1 --eval-interval 1000 --log-interval 2 --log-params-norm --log-num-zeros-in-grad
--seed 1234""".split()
FORMATS = {"dp_reshardable": (), "fully_reshardable": ("--dist-ckpt-optim-fully-reshardable",)}
FLASH = ("--optimizer", "flash_adamw", "--train-iters", "8")
LOSS = re.compile(r"iteration +(\d+)/.*?lm loss: ([\d.E+-]+).*?params norm: ([\d.E+-]+)")


def device_flags() -> tuple[str, ...]:
    """Return the flags that Megatron needs on this machine."""
    return ("--transformer-impl", "local") if torch.cuda.is_available() else cpu.MEGATRON_FLAGS


def data_flags(corpus: Path) -> list[str]:
    """Return the flags that name the corpus of ``scripts/prepare_corpus.py``."""
    return [
        *("--train-data-path", str(corpus / "train_document")),
        *("--valid-data-path", str(corpus / "valid_document")),
        *("--data-cache-path", str(corpus / "cache")),
    ]


def pretrain(corpus: Path, *flags: str, model: Sequence[str] = MODEL) -> dict[int, tuple[str, str]]:
    """Train on two ranks; returns loss and parameter norm, as printed.

    Printed are even iterations, with the mean loss of two, and the first one after a start.
    """
    return losses(printed(corpus, *flags, model=model))


def printed(corpus: Path, *flags: str, model: Sequence[str] = MODEL) -> str:
    """Train on two ranks; returns what they printed, each with what this package logged."""
    arguments = [str(SCRIPT), *model, *device_flags(), *data_flags(corpus), *flags]
    return "".join(run_ranks(2, _pretrain, arguments))


def losses(text: str) -> dict[int, tuple[str, str]]:
    """Return loss and parameter norm of each iteration, as printed."""
    found = {int(i): (loss, norm) for i, loss, norm in LOSS.findall(text)}
    assert found, text[-3000:]
    return found


def _pretrain(arguments: list[str]) -> str:
    from checkpoints import collect_log

    from megatron_flashoptim import run

    logged = collect_log()
    device = [] if torch.cuda.is_available() else ["--device", "cpu"]
    with printed_by_training() as printed:
        run.main([*device, *arguments])
    return "\n".join([printed.getvalue(), *logged, ""])


@contextlib.contextmanager
def printed_by_training() -> Iterator[io.StringIO]:
    """Let Megatron's training run in a forked rank, and collect what it prints."""
    from checkpoints import fork_queue_of_results

    fork_queue_of_results()
    torch.distributed.destroy_process_group = lambda *_: None  # run_ranks does
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        yield printed


def saved_tensors(checkpoint: Path) -> dict[str, Any]:
    """Return every tensor of a torch_dist checkpoint."""
    (loaded,) = run_ranks(1, _load_all, checkpoint)
    return loaded


def _load_all(checkpoint: Path) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load_plain_tensors(str(checkpoint))
    return {key: value for key, value in loaded.items() if torch.is_tensor(value)}
