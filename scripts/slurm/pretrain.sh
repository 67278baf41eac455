#!/usr/bin/env bash
# Pretrains as a Slurm job on one or many nodes, and resumes until it is finished.
#
#   SAVE=/shared/run ARGS_FILE=my.args NODES=4 scripts/slurm/pretrain.sh           submit
#   SAVE=/shared/run ARGS_FILE=my.args NODES=4 scripts/slurm/pretrain.sh --test    show, run nothing
#
# Before the time limit and before a preemption, Megatron saves and exits, and the job is requeued;
# it resumes from SAVE. Set the variables in the environment, or here. More in docs/slurm.md.
set -euo pipefail
set -a # the job gets the variables

# What is trained.
SAVE="${SAVE:-}"                             # required: folder of checkpoints, on a shared disk
ARGS_FILE="${ARGS_FILE:-}"                   # required: Megatron's arguments; all nodes read it
EXTRA_ARGS="${EXTRA_ARGS:-}"                 # more of them, with blanks in quotes; these win
OPTIMIZER="${OPTIMIZER:-}"                   # --optimizer; empty: that of ARGS_FILE or EXTRA_ARGS
LOAD="${LOAD:-}"                             # start from this folder while SAVE has no checkpoint
FIRST_ARGS="${FIRST_ARGS:-}"                 # like EXTRA_ARGS, only while SAVE has no checkpoint
SAVE_INTERVAL="${SAVE_INTERVAL:-}"           # --save-interval, in iterations; empty: likewise
SCRIPT="${SCRIPT:-}"                         # training script; empty: scripts/pretrain_gpt.py

# What it runs on.
NODES="${NODES:-1}"                          # nodes
RANKS_PER_NODE="${RANKS_PER_NODE:-8}"        # processes on each, one for each GPU
DEVICE="${DEVICE:-cuda}"                     # cuda, or cpu: Megatron on CPU ranks, with gloo
TIME="${TIME:-4:00:00}"                      # limit of one start, in Slurm's notation
JOB_NAME="${JOB_NAME:-flash-pretrain}"       # name of the job
# How sbatch is asked for GPUs; empty where a node comes with them and for DEVICE=cpu.
GPU_REQUEST="${GPU_REQUEST---gpus-per-node=$RANKS_PER_NODE}"
# How it is asked for whole nodes with all their memory; empty: as the partition or SBATCH_OPTIONS say.
WHOLE_NODES="${WHOLE_NODES---exclusive --mem=0}"
SBATCH_OPTIONS="${SBATCH_OPTIONS:-}"         # more options of sbatch: partition, account, ...
LOGS="${LOGS:-}"                             # folder of the output; empty: SAVE/logs
RANK_LOGS="${RANK_LOGS:-no}"                 # yes: each rank's output also in LOGS/ranks-JOB-START

# Software.
PYTHON="${PYTHON:-}"                         # empty: .venv of this repository, or the container's
CONTAINER="${CONTAINER:-}"                   # image for pyxis (srun --container-image); empty: none
CONTAINER_MOUNTS="${CONTAINER_MOUNTS:-}"     # FROM:TO,... beside repository, SAVE, LOAD, ARGS_FILE
CONTAINER_ENV="${CONTAINER_ENV:-}"           # NAME,...: variables not to be set by the image
SETUP="${SETUP:-}"                           # bash file sourced in the job: modules, NCCL_*

# Rendezvous of torchrun on the first node.
RDZV_BACKEND="${RDZV_BACKEND:-c10d}"         # c10d, or static: ranks in Slurm's order of the nodes
RDZV_HOST="${RDZV_HOST:-}"                   # its address; empty: the first node's name
RDZV_PORT="${RDZV_PORT:-}"                   # its port; empty: one of 20000 to 29999 by job id
RDZV_SECONDS="${RDZV_SECONDS:-900}"          # how long nodes wait for each other at the start

# Preemption, time limit and crashes.
WARNING_SECONDS="${WARNING_SECONDS:-300}"    # Slurm warns so long before the limit; fits a save
REQUEUE="${REQUEUE:-yes}"                    # no: end where this script would requeue the job
RETRIES="${RETRIES:-3}"                      # requeues in a row of starts that saved nothing new

# Environment of the training processes.
CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # Megatron's tensor parallelism
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"      # threads of each process on the CPU

set +a

program=pretrain.sh # in a job, $0 is Slurm's copy
mode="${1:-submit}"
if [ "$mode" = --job ]; then
    REPO="$2"
else
    REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
fi
if [ ! -f "$REPO/scripts/slurm/common.sh" ]; then
    echo "$program: error: run scripts/slurm/pretrain.sh itself; it calls sbatch" >&2
    exit 2
fi
# shellcheck source=scripts/slurm/common.sh
source "$REPO/scripts/slurm/common.sh"

check() {
    [ -n "$SAVE" ] || die "SAVE is empty: name the folder for checkpoints, on a disk all nodes see"
    [ -n "$ARGS_FILE" ] || die "ARGS_FILE is empty: name a file of Megatron's arguments, like \
those in configs/"
    : "${SCRIPT:=$REPO/scripts/pretrain_gpt.py}" "${LOGS:=$SAVE/logs}"
    default_python
    for name in SAVE ARGS_FILE SCRIPT LOGS; do make_absolute "$name"; done
    for name in LOAD SETUP; do if [ -n "${!name}" ]; then make_absolute "$name"; fi; done
    local given="$RANKS_PER_NODE"
    for name in NODES RANKS_PER_NODE RDZV_SECONDS WARNING_SECONDS; do check_number "$name"; done
    # As above, where it is the default.
    if [ "$GPU_REQUEST" = "--gpus-per-node=$given" ]; then
        GPU_REQUEST="--gpus-per-node=$RANKS_PER_NODE"
    fi
    if [ -n "$SAVE_INTERVAL" ]; then check_number SAVE_INTERVAL; fi
    if [ -n "$RDZV_PORT" ]; then check_number RDZV_PORT 1024 65535; fi
    check_number RETRIES 0
    check_choice DEVICE cuda cpu
    check_choice RDZV_BACKEND c10d static
    check_choice REQUEUE yes no
    check_choice RANK_LOGS yes no
    if [ "$DEVICE" = cpu ]; then GPU_REQUEST=; fi
    [ -f "$ARGS_FILE" ] || die "ARGS_FILE='$ARGS_FILE': no such file"
    # Once it has done its part it may be gone.
    [ -z "$LOAD" ] || [ -d "$LOAD" ] || [ -n "$(newest_checkpoint)" ] ||
        die "LOAD='$LOAD': no such folder"
    [ -z "$SETUP" ] || [ -f "$SETUP" ] || die "SETUP='$SETUP': no such file"
    check_python
    check_newest
    [ -n "$CONTAINER" ] || [ -f "$SCRIPT" ] || die "SCRIPT='$SCRIPT': no such file"
    LIMIT_SECONDS="$(slurm_seconds "$TIME")" ||
        die "TIME='$TIME': give minutes, hours:minutes:seconds or days-hours"
    [ -z "$LIMIT_SECONDS" ] || ((LIMIT_SECONDS > WARNING_SECONDS)) || die "TIME='$TIME' is not \
longer than WARNING_SECONDS='$WARNING_SECONDS': the job would be warned as it starts"
    place_files FIRST_ARGS
    MORE_FILES=("${FILES[@]}")
    split_words "$FIRST_ARGS" FIRST_ARGS
    ONCE_ARGS=("${WORDS[@]}")
    place_files EXTRA_ARGS
    MORE_FILES+=("${FILES[@]}")
    split_words "$EXTRA_ARGS" EXTRA_ARGS
    MORE_ARGS=("${WORDS[@]}")
    check_arguments
    MORE_OPTIONS=()
    for name in GPU_REQUEST WHOLE_NODES SBATCH_OPTIONS; do
        split_words "${!name}" "$name"
        MORE_OPTIONS+=("${WORDS[@]}")
    done
}

# check_arguments: what each start gets must let it resume from SAVE, and say all that it has to.
check_arguments() {
    local word all_read=yes
    read_words "$ARGS_FILE"
    GIVEN=("${WORDS[@]}" "${MORE_ARGS[@]}")
    refuse_first_flags "ARGS_FILE='$ARGS_FILE'" "${WORDS[@]}"
    for word in "${MORE_ARGS[@]}"; do
        refuse_first_flags EXTRA_ARGS "$word"
        if [[ "$word" != @* ]]; then continue; fi
        # One that cannot be read here is the launcher's to read, or to name.
        if [[ -f "${word#@}" && -r "${word#@}" ]]; then
            read_words "${word#@}"
            GIVEN+=("${WORDS[@]}")
            refuse_first_flags "EXTRA_ARGS: $word" "${WORDS[@]}"
        else
            all_read=
        fi
    done
    if [ -z "$all_read" ]; then return; fi
    [ -n "$OPTIMIZER" ] || is_given --optimizer || die "no --optimizer in ARGS_FILE or EXTRA_ARGS, \
and Megatron would take adam: give it there, or set OPTIMIZER=flash_adamw"
    [ -n "$SAVE_INTERVAL" ] || is_given --save-interval || die "no --save-interval in ARGS_FILE or \
EXTRA_ARGS, and Megatron has none: give it there, or set SAVE_INTERVAL"
}

# is_given FLAG: whether it is among the arguments of each start, GIVEN.
is_given() {
    local word
    for word in "${GIVEN[@]}"; do
        if [ "${word%%=*}" = "$1" ]; then return; fi
    done
    return 1
}

# refuse_first_flags SOURCE WORD...: the flags that begin a training from another one's checkpoint.
# With --load SAVE they would throw away what was trained since: iteration, optimizer, data.
refuse_first_flags() {
    local source="$1" word
    shift
    for word in "$@"; do
        case "${word%%=*}" in
            --finetune | --ckpt-step | --no-load-optim | --no-load-rng | \
                --load-main-params-from-ckpt | --override-ckpt-iteration | --moe-use-upcycling)
                die "$source: ${word%%=*} would be repeated by every start, also those that resume \
from SAVE: give it in FIRST_ARGS, used while SAVE has no checkpoint"
                ;;
            --load | --save) # in ARGS_FILE they do no harm: those of this script come later
                [[ "$source" != EXTRA_ARGS* ]] ||
                    die "$source: ${word%%=*} would stand instead of this script's: set SAVE and LOAD"
                ;;
        esac
    done
}

# The iteration of the newest complete checkpoint in SAVE, as Megatron notes it; empty: there is none.
newest_checkpoint() {
    cat "$SAVE/latest_checkpointed_iteration.txt" 2>/dev/null || true
}

# check_newest: there is no such note, or it names a checkpoint. A node that failed while Megatron wrote
# it may leave it empty, and a disk may not answer: the start would take LOAD and begin again, over
# the checkpoints that are there.
check_newest() {
    local note="$SAVE/latest_checkpointed_iteration.txt" found
    if ! found="$(LC_ALL=C cat -- "$note" 2>&1)"; then
        [[ "$found" == *": No such file or directory" ]] || die "${found#cat: }: SAVE may have \
checkpoints, and the training would begin again beside them"
    elif ! [[ "$found" =~ ^[[:space:]]*([0-9]+|release)[[:space:]]*$ ]]; then
        die "$note holds '$found', which is no iteration: writing it was cut off. Write the number of \
the newest whole checkpoint in SAVE into it"
    fi
}

# make_command FIRST_NODE:PORT ID SECONDS_LEFT: leave in COMMAND what runs on each node, and in
# STEP the srun that starts it there. No limit: SECONDS_LEFT is empty.
make_command() {
    local load="$SAVE" flags=() once=() label=() mounted=("$SAVE" "$ARGS_FILE" "${MORE_FILES[@]}")
    if [ -n "$(newest_checkpoint)" ]; then
        # Rather an error than training from scratch into a folder that has checkpoints.
        flags+=(--exit-on-missing-checkpoint)
    else
        once=("${ONCE_ARGS[@]}")
        if [ -n "$LOAD" ]; then
            load="$LOAD"
            mounted+=("$LOAD")
            flags+=(--exit-on-missing-checkpoint)
        fi
    fi
    if [ -n "$3" ]; then
        # Where the warning is lost Megatron exits by itself, in time to save.
        local minutes=$((($3 - WARNING_SECONDS / 2) / 60))
        flags+=(--exit-duration-in-mins "$((minutes > 0 ? minutes : 1))")
    fi
    # How long nodes wait for the first one's store: the one is c10d's (60 s by default), the other static's.
    local wait="read_timeout=$RDZV_SECONDS,timeout=$RDZV_SECONDS"
    COMMAND=(
        "$PYTHON" -m torch.distributed.run
        --nnodes "$NODES" --nproc-per-node "$RANKS_PER_NODE"
        --rdzv-backend "$RDZV_BACKEND" --rdzv-endpoint "$1" --rdzv-id "$2"
        --rdzv-conf "join_timeout=$RDZV_SECONDS,$wait"
        -m megatron_flashoptim.run --device "$DEVICE" --finished "$FINISHED"
        "$SCRIPT" "@$ARGS_FILE" ${OPTIMIZER:+--optimizer "$OPTIMIZER"}
        --save "$SAVE" ${SAVE_INTERVAL:+--save-interval "$SAVE_INTERVAL"} --load "$load"
        --exit-signal-handler "${flags[@]}" "${MORE_ARGS[@]}" "${once[@]}"
    )
    if [ "$RANK_LOGS" = yes ]; then mounted+=("$LOGS"); fi
    container_options CUDA_DEVICE_MAX_CONNECTIONS,OMP_NUM_THREADS "${mounted[@]}"
    # Each line with the number of its node in front.
    if [ "$NODES" -gt 1 ]; then label=(--label); fi
    STEP=(
        srun --nodes "$NODES" --ntasks "$NODES" --ntasks-per-node 1 --cpu-bind none
        --kill-on-bad-exit=1 "${label[@]}" "${CONTAINER_OPTIONS[@]}"
        bash "$REPO/scripts/slurm/node.sh"
    )
}

# take_folder: note in SAVE that this job trains into it; end where another one does, as the two would
# write over each other's checkpoints. The note appears with its content at once, under a second name.
take_folder() {
    local other state mine="$SAVE/.job-$SLURM_JOB_ID"
    OWNER="$SAVE/.job"
    echo "$SLURM_JOB_ID" >"$mine"
    if ! ln "$mine" "$OWNER" 2>/dev/null; then
        other="$(cat "$OWNER" 2>/dev/null)" || other=
        state=
        if [ -n "$other" ] && [ "$other" != "$SLURM_JOB_ID" ]; then
            # One that has ended is not known for long; one that waits will find this one's note.
            state="$(squeue --noheader --job "$other" --format %T 2>/dev/null)" || state=
        fi
        case "$state" in RUNNING | SUSPENDED)
            rm -f "$mine"
            die "SAVE='$SAVE': job $other is $state and trains into it; cancel one of the two jobs"
            ;;
        esac
        # Not by mv, which leaves two names of one file as they are.
        rm -f "$OWNER"
        ln "$mine" "$OWNER" 2>/dev/null || cp "$mine" "$OWNER"
    fi
    rm -f "$mine"
}

run_job() {
    local before after left written code=0
    mkdir -p "$SAVE" "$LOGS"
    take_folder
    FINISHED="$SAVE/.finished-$SLURM_JOB_ID"
    rm -f "$FINISHED"
    TRIES="$LOGS/.retries-$SLURM_JOB_ID"
    written="$(errors_size)"
    before="$(newest_checkpoint)"
    : "${RDZV_HOST:=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
    left="$(slurm_seconds "$(squeue --noheader --job "$SLURM_JOB_ID" --format %L)")" || left=
    : "${RDZV_PORT:=$((20000 + SLURM_JOB_ID % 10000))}"
    make_command "$RDZV_HOST:$RDZV_PORT" "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" "$left"
    if [ "$RANK_LOGS" = yes ]; then
        export RANK_LOGS_FOLDER="$LOGS/ranks-$SLURM_JOB_ID-$((${SLURM_RESTART_COUNT:-0} + 1))"
    fi
    say "on $SLURM_JOB_NODELIST, from ${before:+iteration }${before:-the beginning}"
    show "${STEP[@]}" "${COMMAND[@]}"
    set +e # within "||" it would not stop SETUP either
    run_to_its_end in_environment "${STEP[@]}" "${COMMAND[@]}"
    code=$?
    set -e
    after="$(newest_checkpoint)"
    if [ -e "$FINISHED" ]; then
        rm -f "$FINISHED" "$TRIES" "$OWNER"
        if [ "$code" != 0 ]; then say "exit code $code, after the end of the training"; fi
        say "finished${after:+; the last checkpoint is that of iteration $after}"
        exit
    fi
    say "ended before training did, with exit code $code; saved are ${after:-no} iterations"
    if (($(iteration "$after") > $(iteration "$before"))); then
        requeue_job
        exit "$code"
    fi
    retry
    exit "$((code > 0 ? code : 1))"
}

# iteration CHECKPOINT: a number to compare for what Megatron notes; -1: there is none.
iteration() {
    if [[ "$1" =~ ^[0-9]+$ ]]; then
        echo "$((10#$1))"
    elif [ -n "$1" ]; then
        echo 0 # "release": Megatron counts from there
    else
        echo -1
    fi
}

# retry: requeue the job after a start (before, after, code, written of run_job) that has saved
# nothing new, as a crash may come before the first save; but not for ever.
retry() {
    local from count=0
    if (($(iteration "$after") < $(iteration "$before"))); then
        say "not requeued: the newest checkpoint was that of iteration $before, and is now that of \
iteration ${after:-(none)}"
        return
    fi
    # On a later start the same code is rather a disk's that one node could not read them from.
    if [ "${SLURM_RESTART_COUNT:-0}" = 0 ] && { [ "$code" = 2 ] || wrong_arguments "$written"; }; then
        say "not requeued: exit code 2 says that its arguments are wrong, as they would be again"
        return
    fi
    may_requeue || return 0
    # Counted from another checkpoint: there was a new one since, so these are not in a row.
    if read -r from count 2>/dev/null <"$TRIES" && [ "$from" != "$(iteration "$before")" ]; then
        count=0
    fi
    if ((count >= 10#$RETRIES)); then
        rm -f "$TRIES"
        say "not requeued: no checkpoint since this start, and RETRIES=$RETRIES"
    elif echo "$(iteration "$before") $((count + 1))" >"$TRIES"; then
        say "no checkpoint since this start: try $((count + 1)) of RETRIES=$RETRIES"
        requeue_job
    else
        say "not requeued: cannot count starts without a checkpoint in $TRIES"
    fi
}

# errors_size: print how much the job has written to its errors, 0 where that is not a file.
errors_size() {
    if [ -f "/proc/$$/fd/2" ]; then stat -Lc %s "/proc/$$/fd/2"; else echo 0; fi
}

# wrong_arguments SIZE: whether torchrun has reported, after so many bytes of errors, a process with
# exit code 2, that of argparse; its own is 1 whatever fails.
wrong_arguments() {
    [ -f "/proc/$$/fd/2" ] &&
        grep -aq 'exitcode  *: 2 (pid: ' < <(tail -c "+$(($1 + 1))" "/proc/$$/fd/2")
}

submit_job() {
    local output="$LOGS/%x-%j.log"
    local command=(
        sbatch --parsable --job-name "$JOB_NAME" --output "$output" --open-mode append
        --nodes "$NODES" --ntasks-per-node 1 --time "$TIME" --export ALL
        --requeue --signal "USR1@$WARNING_SECONDS" "${MORE_OPTIONS[@]}"
        "$REPO/scripts/slurm/pretrain.sh" --job "$REPO"
    )
    if [ "$mode" = submit ]; then
        submit "$output" "${command[@]}"
        return
    fi
    FINISHED="$SAVE/.finished-JOB_ID"
    make_command "${RDZV_HOST:-FIRST_NODE}:${RDZV_PORT:-PORT}" JOB_ID-RESTART_COUNT "$LIMIT_SECONDS"
    echo "# Submitted with:"
    show "${command[@]}"
    echo "# Environment of the job, beside that of this shell:"
    show_variables "${BASH_SOURCE[0]}"
    echo "# The job runs, once:"
    show "${STEP[@]}" ...
    if [ "$NODES" -eq 1 ]; then
        echo "# which runs on the node, with PET_NODE_RANK=0:"
    else
        echo "# which runs on each of $NODES nodes, with PET_NODE_RANK=0 to $((NODES - 1)):"
    fi
    if [ "$RANK_LOGS" = yes ]; then
        echo "# (each rank's output is kept in $LOGS/ranks-JOB_ID-START/ too)"
    fi
    show "${COMMAND[@]}"
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
