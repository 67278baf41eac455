"""Run a Megatron training script with flash optimizers known to it.

    torchrun --nproc-per-node 8 -m megatron_flashoptim.run \\
        pretrain_gpt.py --optimizer flash_adamw ...

The script is run unmodified, as ``python SCRIPT ARGUMENTS`` would, after ``install()``. ``@FILE``
among its arguments stands for those in a file, such as one of ``configs/``.
``--device cpu`` before the script runs Megatron on CPU ranks (see ``megatron.cpu``).
``--finished FILE`` makes FILE when the script returns. Megatron returns from a training that is
finished and exits from one that it stops, on a signal or after ``--exit-duration-in-mins``, both
with exit code 0: a scheduler can tell them apart by the file.
"""

from __future__ import annotations

import argparse
import logging
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_flashoptim.cli.argument_files import expand


def main(argv: Sequence[str] | None = None) -> None:
    """Install the plugin and run the script; exits with code 2 on a wrong command line."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_flashoptim.run",
        description="Run a Megatron training script with the flash optimizers known to it.",
        epilog="example: torchrun --nproc-per-node 8 -m megatron_flashoptim.run pretrain_gpt.py "
        "--optimizer flash_adamw --use-distributed-optimizer --bf16 ...",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: run Megatron on CPU ranks with gloo, for machines without a GPU",
    )
    parser.add_argument(
        "--finished",
        type=Path,
        metavar="FILE",
        help="make this file, on each node, when SCRIPT returns rather than exits",
    )
    parser.add_argument("script", metavar="SCRIPT", help="training script, e.g. pretrain_gpt.py")
    parser.add_argument(
        "arguments",
        metavar="...",
        nargs=argparse.REMAINDER,
        help="its arguments; @FILE stands for those in a file",
    )
    options = parser.parse_args(argv)
    script = os.path.abspath(options.script)
    if not os.path.isfile(script):
        parser.error(f"SCRIPT {options.script!r} is not a file")
    if options.finished is not None and not options.finished.absolute().parent.is_dir():
        parser.error(f"--finished {options.finished}: its folder is not there")
    try:
        arguments = expand(options.arguments)
    except ValueError as problem:
        parser.error(str(problem))
    logs_already = logging.getLogger().hasHandlers()
    if options.device == "cpu":
        from megatron_flashoptim.megatron import cpu

        try:
            cpu.enable()
        except RuntimeError as problem:
            parser.error(str(problem))
    from megatron_flashoptim.megatron.install import install
    from megatron_flashoptim.megatron.launching import (
        log_as_megatron,
        skip_compilation_of_built_helpers,
    )

    install()
    skip_compilation_of_built_helpers()
    if not logs_already:
        log_as_megatron()
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")
    # A shared disk may show a file later on other nodes than on the one where it was made.
    if options.finished is not None and os.environ.get("LOCAL_RANK", "0") == "0":
        options.finished.touch()


if __name__ == "__main__":
    main()
