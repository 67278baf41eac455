"""``megatron-flashoptim memory``: bytes per rank of weights, gradients and optimizer state."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from megatron_flashoptim.codec.spec import GROUP_SIZE, MASTER_BITS

GIB = 2**30


@dataclass(frozen=True)
class Footprint:
    """Bytes per parameter of one optimizer, bf16 weights.

    Attributes:
        name: what it is.
        gradient: bytes of gradient per parameter, on every rank.
        state: bytes of optimizer state per parameter, shared by the data-parallel ranks.
        checkpoint: bytes per parameter on disk, weights included.
    """

    name: str
    gradient: float
    state: float
    checkpoint: float

    def per_rank(self, data_parallel_size: int) -> float:
        """Return bytes per parameter that one rank holds."""
        return 2.0 + self.gradient + self.state / data_parallel_size


def flash_state_bytes(master_bits: int) -> float:
    """Return bytes of state per parameter: correction, two codes, two bf16 scales per group."""
    return (master_bits - 16) / 8 + 2 + 2 * 2 / GROUP_SIZE


def footprints(grad_bytes: int) -> list[Footprint]:
    """Return the optimizers side by side for gradients of ``grad_bytes`` bytes."""
    # Stock: fp32 master and moments; it saves the bf16 weight and 12 bytes of state.
    rows = [Footprint("adam (fp32 master and moments)", grad_bytes, 12.0, 14.0)]
    for bits in sorted(MASTER_BITS, reverse=True):
        state = flash_state_bytes(bits)
        rows.append(Footprint(f"flash_adamw, {bits}-bit masters", grad_bytes, state, 2 + state))
    return rows


def render(parameters: float, data_parallel_size: int, grad_bytes: int) -> str:
    """Return the table for a number of parameters per model-parallel rank."""
    lines = [
        f"{parameters:.4g} parameters per model-parallel rank, data-parallel size "
        f"{data_parallel_size}, bf16 weights, {'bf16' if grad_bytes == 2 else 'fp32'} gradients",
        "",
        f"{'optimizer':32} {'bytes/param':>11} {'weights':>9} {'grads':>9} {'state':>9} "
        f"{'rank GiB':>9} {'checkpoint':>11}",
    ]
    for row in footprints(grad_bytes):
        total = row.per_rank(data_parallel_size)
        sizes = (2.0, row.gradient, row.state / data_parallel_size, total)
        weights, grads, state, rank = (parameters * size / GIB for size in sizes)
        lines.append(
            f"{row.name:32} {total:11.3f} {weights:9.2f} {grads:9.2f} {state:9.2f} {rank:9.2f} "
            f"{parameters * row.checkpoint / GIB:11.2f}"
        )
    lines += ["", "GiB per rank; the checkpoint is that of all data-parallel ranks together."]
    return "\n".join(lines)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``memory`` command."""
    parser = commands.add_parser(
        "memory",
        help="bytes per rank of weights, gradients and optimizer state",
        epilog="example: megatron-flashoptim memory --parameters 8e9 --data-parallel-size 16",
    )
    parser.add_argument(
        "--parameters",
        type=_positive(float),
        required=True,
        help="parameters of one model-parallel rank, e.g. 8e9",
    )
    parser.add_argument(
        "--data-parallel-size", type=_positive(int), default=1, help="ranks that share the state"
    )
    parser.add_argument(
        "--grad-dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="dtype of the gradient buffer (Megatron's default is fp32)",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    grad_bytes = 2 if options.grad_dtype == "bf16" else 4
    print(render(options.parameters, options.data_parallel_size, grad_bytes))
    return 0


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    parse.__name__ = "number"
    return parse
