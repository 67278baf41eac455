#!/usr/bin/env bash
# Runs the tests with the released Megatron-Bridge (requirements-bridge.txt), which is installed
# once into a folder of its own within the environment (about 520 MB) and put in front of the path:
# its packages would change what Megatron imports in all other tests. Options go to pytest. PYTHON
# and VENV are those of scripts/quickstart.sh.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment dev
cd "$REPO"

folder="$VENV/megatron-bridge"
fingerprint="$(_fingerprint scripts/requirements-bridge.txt)"
if ! _is_stamped "$folder/installed" "$fingerprint"; then
    rm -rf "$folder" "$folder.part"
    target=(--quiet --no-compile --no-deps --target "$folder.part")
    _pip_install "${target[@]}" --requirement scripts/requirements-bridge.txt
    # Its wheel asks for glibc 2.39, for one library that is not imported here.
    _pip_install "${target[@]}" --only-binary :all: --platform "manylinux_2_39_$(uname -m)" \
        nvidia-resiliency-ext==0.6.0
    mv "$folder.part" "$folder"
    echo "$fingerprint" >"$folder/installed"
fi
PYTHONPATH="$REPO:$folder" exec "$VENV_PYTHON" -m pytest tests/megatron/test_bridge.py "$@"
