"""Tensors in files that ``torch.save`` wrote, mapped where they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

DTYPES = (torch.bfloat16, torch.bool, torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_found_where_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    """A view of a larger storage, behind other bytes, in the ways that torch pickles dtypes."""
    from megatron_flashoptim.checkpoint.torch_file import locate, mapped

    saved = (torch.arange(60) % 7).to(dtype).view(6, 10)[1:5, 2:9]
    path = tmp_path / "file"
    with open(path, "wb") as file:
        file.write(b"before")
        torch.save(saved, file)
    with open(path, "rb") as file:
        length = path.stat().st_size - len(b"before")
        stored = locate(file, path.name, len(b"before"), length, checked=True)
    found = mapped(path, stored, dtype)
    assert found.shape == saved.shape
    assert torch.equal(found.to(torch.float32), saved.to(torch.float32))
