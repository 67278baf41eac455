#!/usr/bin/env bash
# Builds the wheel and the source distribution as a release does, looks into both, and tries each
# in a clean environment, away from the repository:
#
#   scripts/test_package.sh [FOLDER]    keeps both in FOLDER, to publish them
#
# A clean environment is a new one in which pip installs the built file, and which sees of this
# project's environment only the packages that the file asks for: the repository is not in it, and
# torch is not installed anew. These packages are links, so that pip resolves no versions. The wheel
# is tried without extras, the source distribution with [train]: it trains. No other extra is
# installed. PYTHON and VENV are those of scripts/quickstart.sh.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment dev
keep="${1:+$(realpath -m "$1")}"
export PYTHONDONTWRITEBYTECODE=1
unset PYTHONPATH

work="$(mktemp -d)"
trap 'wait; rm -rf "$work"' EXIT
# Only what git has: builds leave files in the working tree that later ones would pack.
mkdir "$work/source" "$work/elsewhere"
(cd "$REPO" && git ls-files -z | xargs -0 cp --parents --target-directory "$work/source")
cp -r "$work/source" "$work/built"
cd "$work/elsewhere"
"$VENV_PYTHON" -m build --no-isolation --outdir "$work/dist" "$work/built" >"$work/log" 2>&1 ||
    { cat "$work/log" && die "the build failed; its messages are above"; }
"$VENV_PYTHON" "$REPO/scripts/package_contents.py" "$work/source" "$work/dist"

# try NAME FILE [EXTRA]: install a file into a clean environment and use it there.
try() {
    local python="$work/$1/bin/python"
    "$VENV_PYTHON" "$REPO/scripts/package_environment.py" "$work/$1" "$work"/dist/*.whl "${@:3}"
    PIP_CONFIG_FILE=/dev/null "$VENV_PYTHON" -m pip --isolated --python "$python" install --quiet \
        --disable-pip-version-check --no-index --no-build-isolation --check-build-dependencies \
        "$2${3:+[$3]}"
    "$python" -P -W ignore::UserWarning "$REPO/scripts/package_smoke.py" "$work/source" "${@:3}"
    echo "$(basename "$2"): works in a clean environment${3:+ with [$3]}"
}
try wheel "$work"/dist/*.whl &
try sdist "$work"/dist/*.tar.gz train
wait $!
if [ -n "$keep" ]; then
    mkdir -p "$keep"
    cp "$work"/dist/* "$keep"
    echo "both are in $keep"
fi
