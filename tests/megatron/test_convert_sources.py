"""Sources of Megatron's Adam that another code path of Megatron's wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adam_checkpoints import save_not_distributed
from ranks import run_ranks

STEPS = 3


def test_adam_that_is_not_distributed_keeps_its_step_number(tmp_path: Path) -> None:
    """torch's Adam counts beside the param groups there; without it moments would start anew."""
    from megatron_flashoptim.checkpoint.boxes import Box
    from megatron_flashoptim.checkpoint.description import describe
    from megatron_flashoptim.checkpoint.folder import open_folder
    from megatron_flashoptim.checkpoint.offline import Conversion, Request

    source = tmp_path / "adam"
    source.mkdir()
    (masters,) = run_ranks(1, save_not_distributed, source, STEPS)
    assert masters
    folders = [source]
    for target in ("flash", "adam"):
        request = Request(folders[-1], tmp_path / target, target, master_bits=32)
        folders.append(Conversion(request).run().folder)
        opened = open_folder(folders[-1])
        groups = opened.common["optimizer"]["optimizer"]["param_groups"]
        assert [group["step"] for group in groups] == [STEPS] * len(groups)
    assert all(
        f"step {STEPS}, learning rate" in describe(open_folder(f))["schedule"] for f in folders
    )
    for key, master in masters.items():
        kept = key.replace(".fp32_param.", ".param.")
        shape = opened.reader.shape(kept)  # with the layers in front
        whole = Box((0,) * len(shape), shape)
        assert torch.equal(opened.reader.read(kept, whole).flatten(), master.flatten())


def _save_without(folder: Path, left_out: str) -> None:
    """Save Adam without some of its state."""
    import checkpoints
    import tiny_gpt
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace

    trainer = tiny_gpt.build(tiny_gpt.Setup(flash=None, layers=1))
    trainer.train(1)
    checkpoints.fork_queue_of_results()
    metadata = checkpoints.metadata_of("fully_reshardable")
    state = checkpoints.saved_state(trainer, metadata)

    def without(value: Any) -> Any:
        return None if getattr(value, "key", "") == left_out else value

    state["optimizer"] = dict_list_map_inplace(without, state["optimizer"])
    if left_out == "param_groups":
        del state["optimizer"]["optimizer"]["param_groups"]
    strategy = checkpoints.TorchDistSaveShardedStrategy()
    dist_checkpointing.save(state, str(folder), strategy, content_metadata=metadata)


@pytest.mark.parametrize(
    ("left_out", "says"),
    [
        ("param_groups", "has no param groups in its common state"),
        (
            "optimizer.state.exp_avg_sq.decoder.final_layernorm.weight",
            "has no exp_avg_sq of decoder.final_layernorm.weight, but other state of it",
        ),
    ],
)
def test_state_that_lacks_something_is_refused_before_anything_is_read(
    left_out: str, says: str, tmp_path: Path
) -> None:
    """By a dry run too; the tensors of a large model are read for hours."""
    from megatron_flashoptim.checkpoint.offline import Conversion, Request

    source = tmp_path / "adam"
    source.mkdir()
    run_ranks(1, _save_without, source, left_out)
    with pytest.raises(ValueError, match=says):
        Conversion(Request(source, tmp_path / "flash", "flash"))
