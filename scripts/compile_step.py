#!/usr/bin/env python3
"""Compile the fused step of every update rule for an H100 without one, and print what it takes.

    python scripts/compile_step.py
    python scripts/compile_step.py --rule flash_lion --master-bits 24 --save FOLDER

With --save, the machine code too, to be compared with that of another commit. Needs no GPU; the
assembler comes with Triton.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_flashoptim.codec.spec import EXP_AVG_SQ_CODES, GROUP_SIZE, MASTER_BITS, ROUNDINGS
from megatron_flashoptim.kernels import columns, step
from megatron_flashoptim.optim.rules import RULES, rule_of
from megatron_flashoptim.optim.segments import GROUPS_PER_ENTRY

H100 = GPUTarget("cuda", 90, 32)
_CORRECTION = {16: None, 24: "*i8", 32: "*i16"}
_GRAD = {"bf16": "*bf16", "fp32": "*fp32"}


def compiled(
    rule: str, grad: str, bits: int, rounding: str, code: str, *, geometry: step.Geometry
) -> Any:
    """Return Triton's compiled kernel of a rule, for bf16 weights and rounding of all kinds."""
    update = rule_of(rule)
    keeps = update.keeps_exp_avg_sq
    types = {
        "param_ptr": "*bf16",
        "correction_ptr": _CORRECTION[bits],
        "grad_ptr": _GRAD[grad],
        "exp_avg_ptr": "*i8",
        "exp_avg_scale_ptr": "*bf16",
        "exp_avg_sq_ptr": "*u8" if keeps else None,
        "exp_avg_sq_scale_ptr": "*bf16" if keeps else None,
        "hyper_ptr": "*fp32",
        "grad_scale_ptr": "*fp32",
        "skip_ptr": "*fp32",
    }
    constants = {
        "PREPARE": update.prepare,
        "UPDATE": update.update,
        "HAS_EXP_AVG_SQ": keeps,
        "MASTER_BITS": bits,
        "FOURTH_ROOT": code == "fourth_root",
        "STOCHASTIC_EXP_AVG_SQ": keeps and rounding == "stochastic",
        "STOCHASTIC_MASTER": bits == 16 or rounding == "stochastic",
        "HYPER_COLUMNS": columns.COLUMNS,
        "ENTRY": GROUPS_PER_ENTRY,
        "TILES": geometry.tiles_per_program,
        "STAGES": geometry.num_stages,
        "GROUPS": geometry.groups_per_tile,
        "GROUP": GROUP_SIZE,
    }
    return compile_kernel(step._step_kernel, types, constants, geometry=geometry)


def compile_kernel(
    kernel: Any, types: dict[str, str | None], constants: dict[str, Any], *, geometry: step.Geometry
) -> Any:
    """Compile a step kernel; pointers are to aligned tensors, None to none, the rest is int32."""
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        else:
            kind = types.get(name, "i32" if name == "num_groups" else "*i32")
            signature[name] = "constexpr" if kind is None else kind
            if kind is None:
                constants[name] = None
    runtime = [name for name in kernel.arg_names if signature[name] != "constexpr"]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in runtime}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {
        "num_warps": geometry.num_warps,
        "maxnreg": geometry.max_registers,
        "enable_fp_fusion": False,
    }
    return triton.compile(source, target=H100, options=options)


def resources(cubin: bytes) -> tuple[int, int, str]:
    """Return registers per thread, bytes of local memory (spills), and the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        used = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        code = subprocess.run(
            [triton.knobs.nvidia.nvdisasm.path, "-c", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", used.stdout + used.stderr)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no registers: {used.stdout}{used.stderr}")
    return int(found[1]), int(found[2]), code.stdout


def instructions(code: str) -> list[str]:
    """Return the instructions of machine code, without labels, comments and padding."""
    lines = [re.sub(r"/\*.*?\*/", "", line).strip() for line in code.splitlines()]
    found = [line for line in lines if line.endswith(";")]
    while found and found[-1] in ("NOP ;", "BRA `(.L_x_0);"):
        found.pop()
    return found


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rule", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--grad-dtype", nargs="+", choices=_GRAD, default=list(_GRAD))
    parser.add_argument("--master-bits", nargs="+", type=int, choices=MASTER_BITS, default=[24])
    parser.add_argument("--rounding", nargs="+", choices=ROUNDINGS, default=list(ROUNDINGS))
    parser.add_argument("--code", nargs="+", choices=EXP_AVG_SQ_CODES, default=["sqrt"])
    parser.add_argument(
        "--small", action="store_true", help="the geometry of small shards, not of large ones"
    )
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write the machine code")
    options = parser.parse_args()
    geometry = step.SMALL if options.small else step.LARGE
    print(
        f"{'rule':14} {'grad':4} {'bits':>4} {'rounding':10} {'code':11} {'regs':>4} "
        f"{'spilled':>7} {'instructions':>12} {'shared':>6}"
    )
    for rule, grad, bits, rounding, code in itertools.product(
        options.rule, options.grad_dtype, options.master_bits, options.rounding, options.code
    ):
        kernel = compiled(rule, grad, bits, rounding, code, geometry=geometry)
        registers, spilled, text = resources(kernel.asm["cubin"])
        found = instructions(text)
        print(
            f"{rule:14} {grad:4} {bits:4} {rounding:10} {code:11} {registers:4} {spilled:7} "
            f"{len(found):12} {kernel.metadata.shared:6}",
            flush=True,
        )
        if options.save:
            options.save.mkdir(parents=True, exist_ok=True)
            name = f"{rule}-{grad}-{bits}-{rounding}-{code}.sass"
            (options.save / name).write_text("\n".join(found) + "\n")


if __name__ == "__main__":
    main()
