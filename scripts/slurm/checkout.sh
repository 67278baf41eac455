#!/usr/bin/env bash
# Runs a command with the code of this checkout, also in a container whose image has another one: a
# PYTHONPATH that the image sets is searched after it.
set -euo pipefail
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
exec "$@"
