"""Comparison of weights and optimizer state bit for bit."""

from __future__ import annotations

from typing import Any

import torch


def assert_same_state(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Fail unless weights, state and param groups of two runs agree bit for bit."""
    assert ours["groups"] == theirs["groups"]
    for kind in ("weights", "state"):
        assert ours[kind].keys() == theirs[kind].keys()
        for key, tensor in ours[kind].items():
            other = theirs[kind][key]
            assert tensor.dtype == other.dtype, key
            same = torch.equal(tensor.view(torch.uint8), other.view(torch.uint8))
            assert same, (key, (tensor.float() != other.float()).sum())
