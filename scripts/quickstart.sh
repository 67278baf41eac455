#!/usr/bin/env bash
# The first command after git clone: installs the project into .venv, trains a small GPT once
# with Adam and once with flash_adamw, resumes flash_adamw from its checkpoint, and compares them
# in a table and a picture. Needs Python 3.12 (3.13 is allowed and not tested); no GPU. Run it again
# to see the results again.
#
#   scripts/quickstart.sh            2 to 5 minutes of installing, 3 of training
#   scripts/quickstart.sh --help     options
#
# PYTHON=... names the interpreter, VENV=... the folder of the environment.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# Wrong options are told before anything is installed.
BASE_PYTHON="$VENV_PYTHON"
if [ -z "$(_describe_python "$BASE_PYTHON")" ]; then find_python; fi
for option in "$@"; do
    case "$option" in
        -h | --help) exec "$BASE_PYTHON" "$REPO/scripts/quickstart.py" --help ;;
    esac
done
"$BASE_PYTHON" "$REPO/scripts/quickstart.py" "$@" --check

QUICKSTART_STARTED="$(date +%s)"
export QUICKSTART_STARTED
echo "[1/6] 00:00 Python environment"
ensure_environment
exec "$VENV_PYTHON" "$REPO/scripts/quickstart.py" "$@"
