"""All tests here need Megatron in this process before they fork ranks."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def _megatron(megatron: None) -> None:
    logging.disable(logging.WARNING)
