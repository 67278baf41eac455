#!/usr/bin/env python3
"""Step the same gradients with and without Transformer Engine and Apex; compare every bit.

    python scripts/same_bits.py

For each of the four ways of having the two packages, as far as they are installed, a process that
cannot import the others builds Megatron's DistributedDataParallel and a flash optimizer of a GPT,
gives it the same gradients, and steps with clipping. Printed are the Adam that Megatron built
first, and hashes of gradient norms, weights and state after the last step, which must be the same.
What the packages change in a model is left out: there is no forward pass.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.abc
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import bench_gpt
import torch

PACKAGES = ("transformer_engine", "apex")
# Top-level modules of Apex's kernels, which Megatron imports by themselves.
WITH_PACKAGE = {"apex": ("apex", "amp_C"), "transformer_engine": ("transformer_engine",)}
_RESULT = "same_bits: "


class Hidden(importlib.abc.MetaPathFinder):
    """Lets packages be as if they were not installed.

    Args:
        names: top-level modules.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = set(names)

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        """Refuse the hidden ones, and leave all others to the next finder."""
        if name.partition(".")[0] in self._names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def step(options: argparse.Namespace) -> dict[str, str]:
    """Return the Adam that Megatron built and hashes, in a process with some of the packages."""
    hidden = [name for p in PACKAGES if p not in options.packages for name in WITH_PACKAGE[p]]
    sys.meta_path.insert(0, Hidden(hidden))
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ["MASTER_PORT"] = "0"
    with bench_gpt.started_rank(options):
        import megatron.core.optimizer as megatron_optimizer

        from megatron_flashoptim import FlashOptimConfig

        trained = bench_gpt.TrainedGPT(
            options, FlashOptimConfig(), fp32_gradients=False, clip_grad=1.0
        )
        generator = torch.Generator().manual_seed(1)
        norms = []
        for _ in range(options.steps):
            trained.zero_gradients()
            for buffer in trained.chunk.buffers:
                values = torch.randn(buffer.grad_data.shape, generator=generator)
                buffer.grad_data.copy_(values)
            _, norm, _ = trained.optimizer.step()
            norms.append(norm)
        adam = megatron_optimizer.Adam
        found = {"adam": f"{adam.__module__}.{adam.__qualname__}"}
        found["norms"] = digest(norms)
        found["weights"] = digest(trained.chunk.parameters())
        found["state"] = digest(
            tensor
            for member in trained.optimizer.chained_optimizers
            for shard in member.optimizer.shards
            for _, tensor in shard.state()
        )
        found["loaded"] = ", ".join(p for p in PACKAGES if p in sys.modules) or "neither"
        return found


def digest(tensors: Any) -> str:
    """Return a hash of the tensors' bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        data = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
        found.update(data.cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def run(options: argparse.Namespace, packages: tuple[str, ...]) -> dict[str, str]:
    """Run ``step`` in a process of its own."""
    command = [sys.executable, __file__, "--device", options.device, "--steps", str(options.steps)]
    for name in ("layers", "hidden", "heads", "vocab", "sequence", "bucket_size"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run(
        [*command, "--packages", *packages], capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if done.returncode or not lines:
        sys.exit(f"same_bits: with {packages or 'neither'}:\n{done.stderr[-3000:]}")
    found: dict[str, str] = json.loads(lines[-1].removeprefix(_RESULT))
    return found


def main() -> None:
    """Run all ways, print, and fail where bits differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    bench_gpt.add_model_options(parser)
    parser.set_defaults(layers=4, hidden=1024, heads=16, vocab=8192, micro_batch=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--packages", nargs="*", choices=PACKAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.packages is not None:
        print(_RESULT + json.dumps(step(options)))
        return
    installed = [name for name in PACKAGES if importlib.util.find_spec(name)]
    ways = [way for n in range(len(installed) + 1) for way in itertools.combinations(installed, n)]
    rows = [run(options, way) for way in ways]
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    kinds = ("norms", "weights", "state")
    if any(row[kind] != rows[0][kind] for row in rows for kind in kinds):
        sys.exit("same_bits: bits differ")
    print(f"the same bits with each of: {'; '.join(row['loaded'] for row in rows)}")


if __name__ == "__main__":
    main()
