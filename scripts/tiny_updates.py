#!/usr/bin/env python3
"""How masters of 16, 24 and 32 bits take updates far below their precision.

A weight of 1.0 gets 10,000 updates of -1e-7 (or what the options say), stored after each as the
optimizer would store it. Prints where 4,096 such weights end, beside fp32 and exact arithmetic.

    python scripts/tiny_updates.py
"""

from __future__ import annotations

import argparse

import torch

from megatron_flashoptim.codec import join_master, split_master
from megatron_flashoptim.codec.spec import Rounding

COPIES = 4096


def final_weights(
    bits: int | None, rounding: Rounding, *, weight: float, update: float, steps: int
) -> torch.Tensor:
    """Return the weights after all updates, fp32; ``bits`` None keeps plain fp32."""
    value = torch.full((COPIES,), weight)
    for step in range(steps):
        value = value - update
        if bits is not None:
            high, correction = split_master(value, bits=bits, rounding=rounding, seed=1, step=step)
            value = join_master(high, correction)
    return value


def main() -> None:
    """Run all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--update", type=float, default=1e-7)
    parser.add_argument("--steps", type=int, default=10_000)
    options = vars(parser.parse_args())
    exact = options["weight"] - options["update"] * options["steps"]
    cases: list[tuple[str, int | None, Rounding]] = [
        ("fp32", None, "nearest"),
        ("32 bits", 32, "nearest"),
        ("24 bits, nearest", 24, "nearest"),
        ("24 bits, stochastic", 24, "stochastic"),
        ("16 bits, stochastic", 16, "stochastic"),
    ]
    print(f"{'master':20} {'mean':>11} {'spread':>10} {'of the exact change':>20}")
    print(f"{'exact':20} {exact:11.7f} {0:10.1e} {1:20.1%}")
    for name, bits, rounding in cases:
        final = final_weights(bits, rounding, **options).double()
        moved = (options["weight"] - final.mean().item()) / (options["weight"] - exact)
        print(f"{name:20} {final.mean():11.7f} {final.std():10.1e} {moved:20.1%}")


if __name__ == "__main__":
    main()
