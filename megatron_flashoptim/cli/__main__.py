"""``python -m megatron_flashoptim.cli``: the command, where it is not installed."""

from megatron_flashoptim.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
