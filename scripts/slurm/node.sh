#!/usr/bin/env bash
# Started by srun once on each node: runs a command, torchrun, with the code of this checkout, and
# passes Slurm's warning on.
#
# Slurm signals this process alone (SIGUSR1 before the time limit, SIGTERM before a preemption).
# torchrun would pass a SIGTERM on, and kill its workers 30 s later, in the middle of a save. So
# torchrun ignores both signals, and the workers, torchrun's children, get a SIGTERM from here:
# Megatron's --exit-signal-handler then saves after the iteration and exits, however long it takes.
set -uo pipefail

# Read by torchrun: its node rank with --rdzv-backend static, and (torch 2.11; 2.9 ignores it) which
# signals it handles. Where Slurm signals all processes of a job, torchrun gets SIGTERM too.
export PET_NODE_RANK="${SLURM_NODEID:-0}" PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT

# Triton compiles the kernels in every rank at the first step, by default into the home folder, which
# all nodes may share. Rather on the node, and for this job alone: what was built in one container may
# not load in another one. Each start begins with none, as a damaged one could be why the last failed.
cache_folder() {
    local folder="${TMPDIR:-/tmp}"
    # A container may lack the TMPDIR of the node.
    if ! [ -d "$folder" ] || ! [ -w "$folder" ]; then folder=/tmp; fi
    # With the node's number, as nodes could share it.
    folder+="/triton-${SLURM_JOB_ID:-$$}-${SLURM_NODEID:-0}"
    # Code is loaded from there, and others may write to /tmp: only a folder of this user's will do.
    if [ -O "$folder" ] && ! [ -L "$folder" ]; then rm -rf "$folder"; fi
    if mkdir -m 700 "$folder" 2>/dev/null; then echo "$folder"; fi
}

cache=
if [ -z "${TRITON_CACHE_DIR:-}" ]; then
    cache="$(cache_folder)"
    if [ -n "$cache" ]; then export TRITON_CACHE_DIR="$cache"; fi
fi

workers() {
    grep -l "^PPid:[[:space:]]*$launcher\$" /proc/[0-9]*/status 2>/dev/null | cut -d / -f 3
}

warn_workers() {
    warned=yes
    local processes
    mapfile -t processes < <(workers)
    echo "node ${SLURM_NODEID:-0}: warned by Slurm; SIGTERM to workers ${processes[*]:-(none yet)}"
    if [ ${#processes[@]} -gt 0 ]; then kill -TERM "${processes[@]}"; fi
}

# Where each rank's output is to be kept: torchrun writes it there, beside the log of the job. It
# numbers the ranks of a node; the node is in the folder's name.
if [ -n "${RANK_LOGS_FOLDER:-}" ]; then
    export PET_TEE=3 PET_LOG_DIR="$RANK_LOGS_FOLDER/node${SLURM_NODEID:-0}-${SLURMD_NODENAME:-$HOSTNAME}"
fi

(trap '' TERM USR1 && exec bash "$(dirname "${BASH_SOURCE[0]}")/checkout.sh" "$@") &
launcher=$!
trap warn_workers TERM USR1
while true; do
    warned=
    code=0
    wait "$launcher" || code=$?
    if [ -z "$warned" ]; then
        if [ -n "$cache" ]; then rm -rf "$cache"; fi
        exit "$code"
    fi
done
