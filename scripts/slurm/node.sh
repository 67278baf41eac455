#!/usr/bin/env bash
# Started by srun once on each node: runs a command, torchrun, and passes Slurm's warning on.
#
# Slurm signals this process alone (SIGUSR1 before the time limit, SIGTERM before a preemption).
# torchrun would pass a SIGTERM on, and kill its workers 30 s later, in the middle of a save. So
# torchrun ignores both signals, and the workers, torchrun's children, get a SIGTERM from here:
# Megatron's --exit-signal-handler then saves after the iteration and exits, however long it takes.
set -uo pipefail

# Read by torchrun: its node rank with --rdzv-backend static, and (torch 2.11; 2.9 ignores it) which
# signals it handles. Where Slurm signals all processes of a job, torchrun gets SIGTERM too.
export PET_NODE_RANK="${SLURM_NODEID:-0}" PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT

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

(trap '' TERM USR1 && exec "$@") &
launcher=$!
trap warn_workers TERM USR1
while true; do
    warned=
    code=0
    wait "$launcher" || code=$?
    if [ -z "$warned" ]; then exit "$code"; fi
done
