"""With --optimizer-cuda-graph the optimizer trains as without, in Megatron's own hands.

A step is captured and replayed on a GPU only (scripts/bench_optimizer_step.py compares that); what
decides whether a replay is right, that everything a step reads is on the device, shows here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ranks import run_ranks


def _train(graph: bool, steps: int, folder: Path, *, load: bool) -> dict[str, Any]:
    import checkpoints
    import tiny_gpt
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    options = {"optimizer_cuda_graph": graph, "log_num_zeros_in_grad": False}
    trainer = tiny_gpt.build(tiny_gpt.Setup(optimizer=options))
    scheduler = OptimizerParamScheduler(
        trainer.optimizer,
        init_lr=0.0,
        max_lr=1e-3,
        min_lr=1e-4,
        lr_warmup_steps=3,
        lr_decay_steps=8,
        lr_decay_style="cosine",
        start_wd=0.2,
        end_wd=0.2,
        wd_incr_steps=8,
        wd_incr_style="constant",
    )
    if load:
        checkpoints.load(trainer, folder)
        scheduler.step(trainer.step_number)
    losses = []
    for _ in range(steps):
        losses.append(trainer.step()[0])
        scheduler.step(1)
    if not load:
        checkpoints.save(trainer, folder)
    return {**checkpoints.everything(trainer), "losses": losses}


def test_training_saving_and_resuming_give_the_same_bits(tmp_path: Path) -> None:
    """Groups with and without weight decay, a learning rate that changes, two ranks."""
    import torch

    results = {}
    for graph in (False, True):
        folder = tmp_path / str(graph)
        folder.mkdir()
        first = run_ranks(2, _train, graph, 3, folder, load=False)
        second = run_ranks(2, _train, graph, 3, folder, load=True)
        results[graph] = [*first, *second]
    for ours, expected in zip(results[True], results[False], strict=True):
        assert ours["losses"] == expected["losses"]
        for kind in ("weights", "state"):
            for name, tensor in expected[kind].items():
                assert torch.equal(ours[kind][name], tensor), name
