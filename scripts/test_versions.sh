#!/usr/bin/env bash
# Runs the smoke set (tests marked smoke) with each tested release of Megatron-Core:
#
#   scripts/test_versions.sh                  all of them
#   scripts/test_versions.sh 0.17.1 0.18.2    some
#
# Which they are stands in megatron_flashoptim/megatron/versions.py. A release other than that of
# the environment is installed once into a folder of its own within it, and put in front of the
# path. Each one loads the checkpoints that those before it have saved. Of the environment's own
# release only that is run: scripts/test.sh runs the rest. PYTHON and VENV are those of
# scripts/quickstart.sh.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment dev
cd "$REPO"

releases=("$@")
if [ ${#releases[@]} = 0 ]; then
    read -ra releases < <("$VENV_PYTHON" -c '
from megatron_flashoptim.megatron.versions import TESTED
print(*TESTED)')
fi
own="$("$VENV_PYTHON" -c 'from importlib import metadata; print(metadata.version("megatron-core"))')"

FLASHOPTIM_CHECKPOINTS="$(mktemp -d)"
trap 'rm -rf "$FLASHOPTIM_CHECKPOINTS"' EXIT
export FLASHOPTIM_CHECKPOINTS
for release in "${releases[@]}"; do
    options=(-n 2 --dist worksteal -m smoke tests/megatron)
    path="$REPO"
    if [ "$release" = "$own" ]; then
        options+=(-k test_releases_load_each_others_checkpoints)
    else
        folder="$VENV/megatron-core-$release"
        if [ ! -d "$folder" ]; then
            rm -rf "$folder.part"
            _pip_install --quiet --no-deps --target "$folder.part" "megatron-core==$release"
            mv "$folder.part" "$folder"
        fi
        path="$folder:$path"
    fi
    echo "smoke set with megatron-core $release"
    FLASHOPTIM_MEGATRON_CORE="$release" PYTHONPATH="$path" "$VENV_PYTHON" -m pytest "${options[@]}"
done
