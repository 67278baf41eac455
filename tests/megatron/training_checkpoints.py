"""A tiny GPT saved and loaded by Megatron's own ``save_checkpoint`` and ``load_checkpoint``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import checkpoints
import tiny_gpt
import torch
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training import arguments, async_utils, checkpointing, global_vars

import megatron_flashoptim

_FLAGS = """--optimizer flash_adamw --use-distributed-optimizer --bf16 --micro-batch-size 2
--seq-length 64 --max-position-embeddings 64 --num-attention-heads 4 --train-iters 8 --lr 1e-3
--transformer-impl local --position-embedding-type rope --no-rope-fusion --async-strategy mcore
--no-gradient-accumulation-fusion --no-bias-swiglu-fusion --distributed-backend gloo
--no-masked-softmax-fusion --save-interval 100 --tokenizer-type NullTokenizer
--vocab-size 255""".split()


class Run:
    """A trainer with the arguments, scheduler and checkpointing of Megatron's training loop.

    Args:
        folder: ``--save`` and ``--load``.
        *flags: further flags.
        options: fields of ``tiny_gpt.Setup``.
    """

    def __init__(self, folder: Path, *flags: str, **options: Any) -> None:
        setup = tiny_gpt.Setup(**options)
        megatron_flashoptim.install()
        sys.argv = [
            "pretrain_gpt.py",
            *_FLAGS,
            *("--save", str(folder), "--load", str(folder)),
            *("--tensor-model-parallel-size", str(setup.tp)),
            *("--pipeline-model-parallel-size", str(setup.pp)),
            *("--num-layers", str(setup.layers), "--hidden-size", str(setup.hidden)),
            *flags,
        ]
        unset_num_microbatches_calculator()
        if not torch.cuda.is_available():
            arguments.get_device_arch_version = lambda: 10  # asked with tensor parallelism
        self.args = arguments.validate_args(arguments.parse_args())
        global_vars.set_global_variables(self.args, build_tokenizer=False)
        self.trainer = tiny_gpt.build(setup)
        self.scheduler = OptimizerParamScheduler(
            self.trainer.optimizer,
            init_lr=0.0,
            max_lr=self.args.lr,
            min_lr=0.0,
            lr_warmup_steps=0,
            lr_decay_steps=self.args.lr_decay_iters or 8,
            lr_decay_style="linear",
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=8,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=self.args.use_checkpoint_opt_param_scheduler,
            override_opt_param_scheduler=self.args.override_opt_param_scheduler,
        )
        self.context: dict[str, Any] = {}

    def train(self, steps: int) -> list[float]:
        """Train with the scheduler; returns losses."""
        losses = []
        for _ in range(steps):
            losses += self.trainer.train(1)
            self.scheduler.step(increment=1)
        return losses

    def save(self, iteration: int) -> None:
        """Save as the training loop does, to the end of an asynchronous save."""
        self.save_in_background(iteration)
        async_utils.maybe_finalize_async_save(blocking=True)

    def save_in_background(self, iteration: int) -> None:
        """Save as the training loop does, without waiting for an asynchronous save."""
        self.trainer.sync_params()
        checkpoints.fork_queue_of_results()
        checkpointing.save_checkpoint(
            iteration, self.trainer.model, self.trainer.optimizer, self.scheduler, 0, self.context
        )

    def load(self) -> int:
        """Load as the training loop does; returns the iteration."""
        iteration, _ = checkpointing.load_checkpoint(
            self.trainer.model,
            self.trainer.optimizer,
            self.scheduler,
            checkpointing_context=self.context,
        )
        self.trainer.step_number = iteration
        return iteration

    def everything(self) -> dict[str, Any]:
        """Return copies of weights, state and param groups of this rank."""
        return checkpoints.everything(self.trainer)
