"""``megatron-flashoptim inspect --verify`` on whole, changed, cut and missing files."""

from __future__ import annotations

import argparse
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from console import Done, error, run
from damage import flip
from ranks import run_ranks

WEIGHT = "embedding.word_embeddings.weight"
# Of what a rank saved, and the optimizer whose checkpoint it is in.
DAMAGED = [
    ("adam", f"optimizer.state.param.{WEIGHT}"),
    ("adam", f"optimizer.state.exp_avg.{WEIGHT}"),
    ("flash", f"optimizer.state.correction.{WEIGHT}"),
    ("flash", WEIGHT),
    ("buckets", "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.bucket_idx_0.exp_avg_sq"),
]


def _save(folder: Path, optimizer: str) -> None:
    import checkpoints
    import tiny_gpt
    from exact_adamw import use_as_megatrons_adam

    if optimizer == "adam":
        use_as_megatrons_adam()
        trainer = tiny_gpt.build(tiny_gpt.Setup(flash=None, layers=1))
    else:
        trainer = tiny_gpt.build(tiny_gpt.Setup(layers=1))
    trainer.train(1)
    checkpoints.save(trainer, folder / optimizer, "fully_reshardable")
    if optimizer == "flash":
        checkpoints.save(trainer, folder / "buckets", "dp_reshardable")
    # As Megatron's save_checkpoint names and fills them.
    rank = folder / f"legacy_{optimizer}" / "mp_rank_00"
    rank.mkdir(parents=True)
    model = trainer.model[0].module
    state = {
        "args": argparse.Namespace(world_size=1, params_dtype=torch.bfloat16),
        "model": model.state_dict_for_save_checkpoint(),
        "optimizer": trainer.optimizer.state_dict(),
        "rng_state": [{"torch_rng_state": torch.get_rng_state()}],
    }
    torch.save(state, rank / "model_optim_rng.pt")
    trainer.optimizer.save_parameter_state(str(rank / "distrib_optim.pt"))


@pytest.fixture(scope="module")
def whole(megatron: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    for name in ("adam", "flash", "buckets"):
        (folder / name).mkdir()
    for optimizer in ("adam", "flash"):
        run_ranks(1, _save, folder, optimizer)
    return folder


def test_files_of_data_loaders_do_not_make_it_a_legacy_checkpoint(
    whole: Path, tmp_path: Path
) -> None:
    """Megatron saves them beside the model where --dataloader-save is --save."""
    folder = tmp_path / "flash"
    shutil.copytree(whole / "flash", folder)
    loader = folder / "mp_rank_00" / "train_dataloader_dprank000.pt"
    loader.parent.mkdir()
    torch.save({"dataloader_state_dict": torch.arange(4096)}, loader)
    assert _verify(folder).returncode == 0
    assert run("inspect", str(folder)).returncode == 0
    for file in (next(folder.glob("*.distcp")), loader):
        middle = file.stat().st_size // 2
        flip(file, middle)
        assert any(line.startswith(f"{file.relative_to(folder)}: ") for line in _damaged(folder))
        flip(file, middle)


def _verify(folder: Path, *arguments: str) -> Done:
    return run("inspect", str(folder), "--verify", *arguments)


def _damaged(folder: Path, *arguments: str) -> list[str]:
    """Return what is said to be damaged, with exit code 1 and one line on stderr."""
    done = _verify(folder, *arguments)
    assert done.returncode == 1, done.stdout
    (said,) = done.stderr.splitlines()
    assert f"the checkpoint in {folder} is damaged, see above. Copy it again" in said
    lines = [line for line in done.stdout.splitlines() if line.startswith("damaged: ")]
    assert f", {len(lines)} damaged" in done.stdout
    return [line.removeprefix("damaged: ") for line in lines]


def _item(folder: Path, key: str) -> tuple[Path, int]:
    """Return the file of a saved tensor and a byte in the middle of it."""
    from megatron_flashoptim.checkpoint.reader import CheckpointReader

    for index, info in CheckpointReader(folder).metadata.storage_data.items():
        if index.fqn == key:
            return folder / info.relative_path, info.offset + info.length // 2
    raise AssertionError(f"{key} is not in {folder}")


@pytest.mark.parametrize("name", ["adam", "flash", "buckets", "legacy_adam", "legacy_flash"])
def test_an_intact_checkpoint_is_read_whole(name: str, whole: Path) -> None:
    done = _verify(whole / name)
    assert (done.returncode, done.stderr) == (0, "")
    said = re.search(r"(\d+) bytes read in \d+\.\d s: \d+ items in (\d+) files, none", done.stdout)
    files = [file for file in (whole / name).rglob("*") if file.is_file()]
    assert said and (int(said[1]), int(said[2])) == (
        sum(file.stat().st_size for file in files),
        len(files),
    )
    assert "without a CRC-32" not in done.stdout


@pytest.mark.parametrize(("name", "key"), DAMAGED)
def test_a_flipped_bit_names_file_and_tensor(
    name: str, key: str, whole: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole / name, tmp_path / name))
    file, position = _item(folder, key)
    flip(file, position)
    changed = "its bytes are not those that were saved, by their CRC-32"
    assert _damaged(folder) == [f"{file.name}: {key}: {changed}"]


def test_all_that_is_damaged_is_named_by_processes_side_by_side_too(
    whole: Path, tmp_path: Path
) -> None:
    """Two tensors, and the end of the file with the last; then the whole file."""
    folder = Path(shutil.copytree(whole / "adam", tmp_path / "adam"))
    keys = [key for name, key in DAMAGED if name == "adam"]
    for key in keys:
        flip(*_item(folder, key))
    (file,) = folder.glob("__0_0.distcp")
    size = file.stat().st_size
    os.truncate(file, size - 100)
    found = _damaged(folder)
    assert len(found) == 3 and all(any(key in line for line in found) for key in keys)
    assert re.fullmatch(rf"{file.name}: {size - 100} of {size} bytes, without \S+", found[-1])
    assert _damaged(folder, "--processes", "2") == found
    file.unlink()
    (found_missing,) = _damaged(folder)
    assert re.fullmatch(rf"{file.name}: No such file .*, with \S+ and \d+ more", found_missing)


def test_files_beside_the_tensors_are_compared_too(whole: Path, tmp_path: Path) -> None:
    """The common state of releases before 0.19, and what only a manifest has a sum of."""
    from megatron.core.dist_checkpointing.validation import save_integrity_manifest

    folder = Path(shutil.copytree(whole / "flash", tmp_path / "flash"))
    torch.save({"optimizer": [{"lr": torch.ones(99)}]}, folder / "common.pt")
    flip(folder / "common.pt", (folder / "common.pt").read_bytes().index(b"\0\0\x80\x3f" * 99))
    save_integrity_manifest(str(folder))
    with open(folder / "metadata.json", "a") as file:
        file.write(" ")
    assert _damaged(folder) == [
        "metadata.json: not the file of which the integrity manifest has a hash",
        "common.pt: optimizer.0.lr: its bytes are not those that were saved, by their CRC-32",
    ]


@pytest.mark.parametrize("optimizer", ["adam", "flash"])
def test_a_legacy_checkpoint_names_its_tensors(optimizer: str, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole / f"legacy_{optimizer}", tmp_path / "iter_0000001"))
    weights, state = (
        folder / "mp_rank_00" / f"{n}.pt" for n in ("model_optim_rng", "distrib_optim")
    )
    found = torch.load(weights, weights_only=False)["model"][WEIGHT]
    content = found.view(torch.uint8).numpy().tobytes()
    place = weights.read_bytes().index(content)
    flip(weights, place + len(content) // 2)
    (said,) = _damaged(tmp_path / "iter_0000001")
    assert said.startswith(f"mp_rank_00/model_optim_rng.pt: model.{WEIGHT}: its bytes are not")
    os.truncate(state, state.stat().st_size // 2)
    said, _ = _damaged(folder)
    assert said.startswith("mp_rank_00/distrib_optim.pt: cannot be read (")


def test_what_has_no_sums_is_said(tmp_path: Path) -> None:
    """As it is saved after ``torch.serialization.set_crc32_options(False)``."""
    rank = tmp_path / "iter_0000001" / "mp_rank_00"
    rank.mkdir(parents=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.ones(99)}, rank / "model_optim_rng.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    done = _verify(rank.parent)
    size = (rank / "model_optim_rng.pt").stat().st_size
    assert f"{size} of these bytes were saved without a CRC-32" in done.stdout
    assert done.returncode == 0


def test_options_of_what_is_printed_otherwise_are_refused() -> None:
    for option in (("--against", "b"), ("--layers",), ("--json", "a"), ("--report", "a.html")):
        said = error("inspect", "a", "--verify", *option, code=2)
        assert f"{option[0]} cannot be used with --verify" in said
