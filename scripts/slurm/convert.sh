#!/usr/bin/env bash
# Converts a checkpoint as a Slurm job on the CPUs of one node: megatron-flashoptim convert.
#
#   SRC=/shared/adam DST=/shared/flash TO=flash scripts/slurm/convert.sh           submit
#   SRC=/shared/adam DST=/shared/flash TO=flash scripts/slurm/convert.sh --test    show, run nothing
#
# Stopped by the time limit or a preemption, a conversion to flash or adam is requeued and goes on
# where it was. One to weights writes them anew in every start: it is requeued after a preemption
# and ends at the time limit, so TIME must hold all of it. Set the variables in the environment, or
# here. More in docs/slurm.md.
set -euo pipefail
set -a # the job gets the variables

# What is converted.
SRC="${SRC:-}"                               # required: folder of a checkpoint, or of --save
DST="${DST:-}"                               # required: folder for the result
TO="${TO:-}"                                 # required: flash, adam or weights
CONVERT_OPTIONS="${CONVERT_OPTIONS:-}"       # more of convert's options, e.g. --iteration 5000

# What it runs on.
PROCESSES="${PROCESSES:-8}"                  # processes side by side, each on a CPU
MEMORY="${MEMORY:-}"                         # of the node; empty: 2 GB for each process
TIME="${TIME:-4:00:00}"                      # limit of one start, in Slurm's notation
JOB_NAME="${JOB_NAME:-flash-convert}"        # name of the job
SBATCH_OPTIONS="${SBATCH_OPTIONS:-}"         # more options of sbatch: partition, account, ...
LOGS="${LOGS:-}"                             # empty: DST/logs, of weights DST.logs beside it

# Software.
PYTHON="${PYTHON:-}"                         # empty: .venv of this repository, or the container's
CONTAINER="${CONTAINER:-}"                   # image for pyxis (srun --container-image); empty: none
CONTAINER_MOUNTS="${CONTAINER_MOUNTS:-}"     # FROM:TO,... beside repository, SRC and DST
CONTAINER_ENV="${CONTAINER_ENV:-}"           # NAME,...: variables not to be set by the image
SETUP="${SETUP:-}"                           # bash file sourced in the job: modules

# Time limit.
REQUEUE="${REQUEUE:-yes}"                    # no: end where this script would requeue the job

set +a

# Slurm warns so long before the limit; a part takes seconds, and a lost one is converted again.
WARNING_SECONDS=60

program=convert.sh # in a job, $0 is Slurm's copy
mode="${1:-submit}"
if [ "$mode" = --job ]; then
    REPO="$2"
else
    REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
fi
if [ ! -f "$REPO/scripts/slurm/common.sh" ]; then
    echo "$program: error: run scripts/slurm/convert.sh itself; it calls sbatch" >&2
    exit 2
fi
# shellcheck source=scripts/slurm/common.sh
source "$REPO/scripts/slurm/common.sh"

check() {
    [ -n "$SRC" ] || die "SRC is empty: name the folder of the checkpoint"
    [ -n "$DST" ] || die "DST is empty: name the folder for the result"
    check_choice TO flash adam weights
    make_absolute DST # before a suffix is put to it
    if [ "$TO" = weights ]; then : "${LOGS:=$DST.logs}"; else : "${LOGS:=$DST/logs}"; fi
    default_python
    for name in SRC LOGS; do make_absolute "$name"; done
    if [ "$TO" = weights ] && [[ "$LOGS/" == "$DST/"* ]]; then
        die "LOGS='$LOGS': lies in DST, which must hold nothing but the weights; name a folder elsewhere"
    fi
    if [ -n "$SETUP" ]; then make_absolute SETUP; fi
    [ -d "$SRC" ] || die "SRC='$SRC': no such folder"
    [ -z "$SETUP" ] || [ -f "$SETUP" ] || die "SETUP='$SETUP': no such file"
    check_number PROCESSES
    : "${MEMORY:=$((2 * PROCESSES))G}" # up to 1.1 GB, and page cache
    check_choice REQUEUE yes no
    check_python
    slurm_seconds "$TIME" >/dev/null ||
        die "TIME='$TIME': give minutes, hours:minutes:seconds or days-hours"
    split_words "$SBATCH_OPTIONS" SBATCH_OPTIONS
    MORE_OPTIONS=("${WORDS[@]}")
    split_words "$CONVERT_OPTIONS" CONVERT_OPTIONS
    MORE_ARGS=("${WORDS[@]}")
    local processes=(--processes "$PROCESSES")
    if [ "$TO" = weights ]; then processes=(); fi
    container_options "" "$SRC" "$DST"
    COMMAND=(
        srun --nodes 1 --ntasks 1 --cpus-per-task "$PROCESSES" --cpu-bind none "${CONTAINER_OPTIONS[@]}"
        bash "$REPO/scripts/slurm/checkout.sh" "$PYTHON" -m megatron_flashoptim.cli convert --to "$TO" "${processes[@]}"
        "${MORE_ARGS[@]}" "$SRC" "$DST"
    )
}

# The number of files in DST: parts are written one by one.
files_written() {
    find "$DST" -type f | wc -l
}

run_job() {
    local files code=0
    mkdir -p "$DST"
    files="$(files_written)"
    say "on $SLURM_JOB_NODELIST"
    show "${COMMAND[@]}"
    set +e # within "||" it would not stop SETUP either
    run_to_its_end in_environment "${COMMAND[@]}"
    code=$?
    set -e
    if [ "$code" = 0 ]; then
        say "finished"
        exit
    fi
    say "ended with exit code $code"
    # An error would be the same again; a signal left finished parts behind it. Weights are written
    # anew: after the SIGTERM of a preemption, not after a kill for memory, which would come again.
    if [ "$TO" = weights ]; then
        if ((code == 128 + 15)); then requeue_job; fi
    elif ((code > 128)) && (($(files_written) > files)); then
        requeue_job
    fi
    exit "$code"
}

submit_job() {
    local output="$LOGS/%x-%j.log" warning=(--signal "TERM@$WARNING_SECONDS")
    # Warned, weights would keep nothing, and be requeued to the same end.
    if [ "$TO" = weights ]; then warning=(); fi
    local command=(
        sbatch --parsable --job-name "$JOB_NAME" --output "$output" --open-mode append
        --nodes 1 --ntasks 1 --cpus-per-task "$PROCESSES" --mem "$MEMORY" --time "$TIME"
        --export ALL --requeue "${warning[@]}" "${MORE_OPTIONS[@]}"
        "$REPO/scripts/slurm/convert.sh" --job "$REPO"
    )
    if [ "$mode" = submit ]; then
        submit "$output" "${command[@]}"
        return
    fi
    echo "# Submitted with:"
    show "${command[@]}"
    echo "# Environment of the job, beside that of this shell:"
    show_variables "${BASH_SOURCE[0]}"
    echo "# The job runs, once:"
    show "${COMMAND[@]}"
    local stopped="by the limit or a preemption" where=" if it finished a part"
    local again="goes on where it was"
    if [ "$TO" = weights ]; then stopped="by a preemption" where="" again="writes the weights anew"; fi
    if [ "$REQUEUE" = yes ]; then
        echo "# Stopped $stopped it is requeued$where, and $again."
    else
        echo "# Stopped $stopped it is not requeued; submitted again, it $again."
    fi
    if [ "$TO" = weights ]; then echo "# At the limit it ends with nothing: TIME must hold it."; fi
}

case "$mode" in
    --job)
        check
        run_job
        ;;
    submit | --test)
        check
        submit_job
        ;;
    *) die "'$mode': give no option to submit the job, or --test; all else is a variable" ;;
esac
