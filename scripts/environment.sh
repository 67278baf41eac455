# Finds Python and makes the project's virtual environment. Source it from bash:
#
#   source scripts/environment.sh
#   ensure_environment        # what training needs: scripts/requirements.txt
#   ensure_environment dev    # and what the tests need: scripts/requirements-dev.txt
#   "$VENV_PYTHON" ...
#
# A second call installs nothing while the requirement files and pyproject.toml are unchanged.
# Reads these variables:
#
#   PYTHON  interpreter to make the environment with, 3.12, or 3.13, which is not tested
#           (default: the first one found, 3.12 before 3.13)
#   VENV    folder of the environment (default: .venv in the repository)
# shellcheck shell=bash

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$REPO/.venv}"
case "$VENV" in /*) ;; *) VENV="$PWD/$VENV" ;; esac
VENV_PYTHON="$VENV/bin/python"
# torch brings the CUDA libraries: 5.1 GB once installed.
VENV_KILOBYTES=6000000

die() {
    printf 'error: %s\n' "$@" >&2
    exit 1
}

# Print an interpreter's version, and " no-venv" after it where it cannot make environments.
# Runs on any Python; prints nothing if the command does not work.
_describe_python() {
    "$1" -c '
import sys
description = "%d.%d" % sys.version_info[:2]
try:
    import ensurepip, venv
except ImportError:
    description += " no-venv"
print(description)' 2>/dev/null || true
}

_list_pythons() {
    type -aP python3.12 python3.13 python3 python || true
    if command -v pyenv >/dev/null; then
        local path
        for path in "$(pyenv root)"/versions/3.1[23]*/bin/python; do
            if [ -x "$path" ]; then echo "$path"; fi
        done
    fi
}

_explain_missing_venv() {
    die "$1 is Python $2 without the venv module; install it:
  Debian, Ubuntu:  sudo apt-get install python$2-venv
or name another interpreter: PYTHON=/path/to/python3.12 $0"
}

# Leave the interpreter to make the environment with in BASE_PYTHON, or explain what to install.
find_python() {
    local path description found="" incomplete=""
    if [ -n "${PYTHON:-}" ]; then
        description="$(_describe_python "$PYTHON")"
        case "$description" in
            3.12 | 3.13) BASE_PYTHON="$PYTHON" && return ;;
            "3.12 no-venv" | "3.13 no-venv") _explain_missing_venv "$PYTHON" "${description% *}" ;;
            "") die "PYTHON=$PYTHON does not run; it must be an interpreter of Python 3.12 or 3.13" ;;
            *) die "PYTHON=$PYTHON is Python ${description% *}; 3.12 or 3.13 is needed" ;;
        esac
    fi
    while IFS= read -r path; do
        description="$(_describe_python "$path")"
        case "$description" in
            3.12 | 3.13) BASE_PYTHON="$path" && return ;;
            "3.12 no-venv" | "3.13 no-venv") incomplete="${incomplete:-$path $description}" ;;
            "") ;;
            *) found="$found $path (${description% *})" ;;
        esac
    done < <(_list_pythons)
    if [ -n "$incomplete" ]; then
        read -r path description _ <<<"$incomplete"
        _explain_missing_venv "$path" "$description"
    fi
    die "Python 3.12 or 3.13 is needed; found${found:- no Python at all}. Install one, for example:
  Debian, Ubuntu:  sudo apt-get install python3.12 python3.12-venv   (or 3.13)
  Fedora, RHEL:    sudo dnf install python3.12
  Homebrew:        brew install python@3.12
  pyenv:           pyenv install 3.12
or name an interpreter: PYTHON=/path/to/python3.12 $0"
}

_fingerprint() {
    { echo "$REPO" && cat "$@" "$REPO/pyproject.toml" "$REPO/setup.py"; } | sha256sum | cut -d' ' -f1
}

_is_stamped() {
    [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]
}

# Make the folder $VENV a working, maybe empty, virtual environment.
_make_venv() {
    local version wanted
    version="$(_describe_python "$VENV_PYTHON")"
    case "$version" in
        3.12 | 3.13)
            if [ -n "${PYTHON:-}" ]; then
                wanted="$(_describe_python "$PYTHON")"
                [ "$version" = "$wanted" ] || die "$VENV has Python $version and PYTHON=$PYTHON is \
${wanted:-no interpreter}; remove $VENV, or name another folder with VENV=..."
            fi
            if "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then return; fi
            ;;
        "") ;;
        *) die "$VENV has Python ${version% *} and 3.12 or 3.13 is needed; remove it, or name \
another folder with VENV=..." ;;
    esac
    if [ -e "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV" 2>/dev/null)" ]; then
        die "$VENV is there and is no virtual environment; name another folder with VENV=..."
    fi
    find_python
    local parent free
    parent="$(dirname "$VENV")"
    mkdir -p "$parent"
    free="$(df -Pk "$parent" | awk 'NR == 2 { print $4 }')"
    if [ "$free" -lt "$VENV_KILOBYTES" ]; then
        die "the environment takes 6 GB and $parent has $((free / 1000000)) GB free; make room, \
or name a folder on another disk with VENV=..."
    fi
    echo "making $VENV with $BASE_PYTHON ($(_describe_python "$BASE_PYTHON"))"
    "$BASE_PYTHON" -m venv --clear "$VENV" || die "$BASE_PYTHON -m venv failed; its message is \
above (on Debian and Ubuntu install python$(_describe_python "$BASE_PYTHON")-venv)"
}

_pip_install() {
    "$VENV_PYTHON" -m pip install --disable-pip-version-check --no-input "$@" ||
        die "pip failed; its message is above. Running the same command again goes on from here"
}

# ensure_environment [dev]: leave in VENV_PYTHON an interpreter with the project installed.
ensure_environment() {
    local kind="${1:-run}" requirements=("$REPO/scripts/requirements.txt") fingerprint options=() file
    case "$kind" in
        run) ;;
        dev) requirements+=("$REPO/scripts/requirements-dev.txt") ;;
        *) die "ensure_environment takes nothing or dev, not '$kind'" ;;
    esac
    if [ "$(uname -s)" != Linux ]; then
        die "Megatron-Core and Triton are published for Linux only; on macOS or Windows run this \
in a Linux container or under WSL 2"
    fi
    _make_venv
    fingerprint="$(_fingerprint "${requirements[@]}")"
    if _is_stamped "$VENV/installed-$kind" "$fingerprint"; then
        echo "reusing $VENV (Python $(_describe_python "$VENV_PYTHON"))"
        return
    fi
    echo "installing into $VENV; the first time this downloads about 2.8 GB"
    for file in "${requirements[@]}"; do options+=(--requirement "$file"); done
    # A line for each package that is there already helps nobody.
    if [ -f "$VENV/installed-run" ]; then options+=(--quiet); fi
    _pip_install "${options[@]}"
    _pip_install --quiet --no-deps --no-build-isolation --editable "$REPO"
    _fingerprint "$REPO/scripts/requirements.txt" >"$VENV/installed-run"
    echo "$fingerprint" >"$VENV/installed-$kind"
}
