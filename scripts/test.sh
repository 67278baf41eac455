#!/usr/bin/env bash
# Runs the tests: sets up .venv with what they need, then pytest. Options go to pytest:
#
#   scripts/test.sh                       everything
#   scripts/test.sh tests/codec -k sqrt   a part
#   scripts/test.sh -n 0 --pdb            in one process, to look into a failure
#
# Two processes share the tests; each starts up to eight ranks, which are CPU ranks. Where there are
# GPUs they are hidden from all that; then, if no part was asked for, the kernels are tested on them.
# MEGATRON_LM_PATH names a checkout of Megatron-LM core_v0.19.0; with it, its unmodified
# pretrain_gpt.py is run too. PYTHON and VENV are those of scripts/quickstart.sh.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment dev
cd "$REPO"
CUDA_VISIBLE_DEVICES='' "$VENV_PYTHON" -m pytest -n 2 --dist worksteal "$@"
if [ $# -eq 0 ] && "$VENV_PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    "$VENV_PYTHON" -m pytest -n 2 --dist worksteal tests/codec tests/kernels tests/optim
fi
