# What the job scripts share; sourced by them, with REPO and program set.
# shellcheck shell=bash disable=SC2034,SC2154 # variables are read there, and set

die() {
    printf '%s: error: %s\n' "$program" "$1" >&2
    exit 2
}

# check_number NAME [LEAST [MOST]]: the variable must hold a whole number of at least LEAST (default:
# 1), and no more than MOST. Zeros in front are taken off: to bash such a number is octal.
check_number() {
    local least="${2:-1}" most="${3:-999999999}" range
    range="of at least $least${3:+ and at most $3}"
    if ! [[ "${!1}" =~ ^[0-9]{1,9}$ ]] || ((10#${!1} < least || 10#${!1} > most)); then
        die "$1='${!1}': must be a whole number $range"
    fi
    printf -v "$1" %d "$((10#${!1}))"
}

# check_choice NAME CHOICE...: the variable must hold one of the choices.
check_choice() {
    local name="$1" choice
    shift
    for choice in "$@"; do
        if [ "${!name}" = "$choice" ]; then return; fi
    done
    die "$name='${!name}': must be one of: $*"
}

# make_absolute NAME: the job may start in another folder.
make_absolute() {
    printf -v "$1" '%s' "$(realpath -m -- "${!1}")"
}

# split_words TEXT SOURCE: leave in the array WORDS the words of TEXT, those with blanks in single or
# double quotes. SOURCE is what an error names.
split_words() {
    local lines
    lines="$(xargs -r printf '%s\n' <<<"$1" 2>/dev/null)" ||
        die "$2: a quote is opened and not closed"
    WORDS=()
    if [ -n "$lines" ]; then mapfile -t WORDS <<<"$lines"; fi
}

# place_files NAME: make the @FILEs among the words of a variable absolute, and leave those that are
# here in the array FILES. One that is not may be in a container, or is the launcher's to name.
place_files() {
    local name="$1" word words=""
    FILES=()
    split_words "${!name}" "$name"
    for word in "${WORDS[@]}"; do
        if [[ "$word" == @* && -f "${word#@}" ]]; then
            word="@$(realpath -- "${word#@}")"
            FILES+=("${word#@}")
        fi
        words+="${words:+ }$(quote_word "$word")"
    done
    # Nothing else of it is touched: with no file it stays as it was given.
    if [ ${#FILES[@]} -gt 0 ]; then printf -v "$name" '%s' "$words"; fi
}

# quote_word WORD: print it as split_words takes it.
quote_word() {
    local quote="'"
    printf "'%s'" "${1//$quote/$quote\\$quote$quote}"
}

# read_words FILE: leave in the array WORDS the words of a file of arguments, the same as the launcher
# reads (megatron_flashoptim/cli/argument_files.py). Here there may be no Python: a container has it.
read_words() {
    local line word number=0
    WORDS=()
    while IFS= read -r line || [ -n "$line" ]; do
        number=$((number + 1))
        line="${line%$'\r'}"
        word= # with an "=" in front once it is begun: it may be empty
        while [ -n "$line" ]; do
            if [[ "$line" =~ ^[[:space:]]+ ]]; then
                if [ -n "$word" ]; then WORDS+=("${word#=}"); fi
                word=
            elif [ -z "$word" ] && [[ "$line" == \#* ]]; then
                break
            elif [[ "$line" =~ ^[^[:space:]\'\"\\]+ ]]; then
                word="${word:-=}${BASH_REMATCH[0]}"
            elif [[ "$line" =~ ^\'([^\']*)\' || "$line" =~ ^\\(.) ]]; then
                word="${word:-=}${BASH_REMATCH[1]}"
            elif [[ "$line" =~ ^\"(([^\"\\]|\\.)*)\" ]]; then
                # Within these a backslash stands for itself, but before one of two characters.
                # shellcheck disable=SC2001 # what a replacement may hold differs by bash's version
                word="${word:-=}$(sed 's/\\\(["\\]\)/\1/g' <<<"${BASH_REMATCH[1]}")"
            else
                die "$1, line $number: a quote is not closed, or a backslash ends the line: $line"
            fi
            line="${line:${#BASH_REMATCH[0]}}"
        done
        if [ -n "$word" ]; then WORDS+=("${word#=}"); fi
    done <"$1"
}

# slurm_seconds TIME: print the seconds of a time in one of Slurm's notations: minutes,
# minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes[:seconds]. An empty line
# stands for no limit, which Slurm takes as a word, as 0 and as -1.
slurm_seconds() {
    local days=0 fields
    case "${1^^}" in UNLIMITED | INFINITE | 0 | -1)
        echo
        return
        ;;
    esac
    [[ "$1" =~ ^([0-9]{1,4}-)?[0-9]{1,6}(:[0-9]{1,6}){0,2}$ ]] || return 1
    IFS=: read -ra fields <<<"${1#*-}"
    if [[ "$1" == *-* ]]; then
        days="${1%%-*}"
        fields+=(0 0)
    elif [ ${#fields[@]} -lt 3 ]; then
        fields=(0 "${fields[@]}" 0)
    fi
    echo $((((10#$days * 24 + 10#${fields[0]}) * 60 + 10#${fields[1]}) * 60 + 10#${fields[2]}))
}

# default_python: a container has an interpreter of its own.
default_python() {
    if [ -n "$CONTAINER" ]; then : "${PYTHON:=python}"; fi
    : "${PYTHON:=$REPO/.venv/bin/python}"
}

# check_python: the interpreter must be here, unless it comes with a container or with SETUP.
check_python() {
    if [ -z "$CONTAINER$SETUP" ] && ! command -v "$PYTHON" >/dev/null; then
        die "PYTHON='$PYTHON': no such interpreter; name that of the environment, make one with \
bash -c '. $REPO/scripts/environment.sh && ensure_environment', or set CONTAINER"
    fi
}

# in_environment COMMAND...: become a command, in the environment that SETUP makes. In a shell of its own:
# what SETUP sets, and that it fails, is not to reach what decides on another start.
in_environment() {
    if [ -n "$SETUP" ]; then
        # shellcheck disable=SC2154 # set in the trap
        trap 'code=$?; say "SETUP ended the start, with exit code $code"; exit $((code > 0 ? code : 1))' EXIT
        set -e
        set +u # scripts of module systems use variables that may not be set
        # shellcheck source=/dev/null
        source "$SETUP"
        set -u
        trap - EXIT
    fi
    exec "$@"
}

# container_options VARIABLES PATH...: leave in the array CONTAINER_OPTIONS what srun takes for pyxis.
# The paths are mounted where they are. The variables, separated by commas, keep the job's values
# where the image sets them too; of all others those of the image stand.
container_options() {
    local variables="$1${1:+${CONTAINER_ENV:+,}}$CONTAINER_ENV" path mounts="$REPO:$REPO"
    shift
    CONTAINER_OPTIONS=()
    if [ -z "$CONTAINER" ]; then return; fi
    for path in "$@"; do
        if [[ ",$mounts," != *",$path:$path,"* ]]; then mounts+=",$path:$path"; fi
    done
    if [ -n "$CONTAINER_MOUNTS" ]; then mounts+=",$CONTAINER_MOUNTS"; fi
    CONTAINER_OPTIONS=("--container-image=$CONTAINER" "--container-mounts=$mounts")
    if [ -n "$variables" ]; then CONTAINER_OPTIONS+=("--container-env=$variables"); fi
}

# show COMMAND...: print a command line as a shell would take it.
show() {
    printf '%q ' "$@" | sed 's/ $//'
    echo
}

# show_variables SCRIPT: print what a job gets in its environment: the variables at a script's top.
show_variables() {
    local name
    while read -r name; do printf '%s=%q\n' "$name" "${!name}"; done < <(
        sed -n 's/^\([A-Z][A-Z_]*\)="\${.*/\1/p' "$1"
    )
}

# submit OUTPUT COMMAND...: run sbatch and say where the job's output goes.
submit() {
    local output="$1" job
    shift
    command -v sbatch >/dev/null || die "no sbatch on the PATH; submit from a login node, or see \
what would run with --test"
    mkdir -p "$(dirname "$output")"
    job="$("$@")" || exit 1
    job="${job%%;*}"
    output="${output//%x/$JOB_NAME}"
    echo "job $job; its output goes to ${output//%j/$job}"
}

# say TEXT: a line of the job's log.
say() {
    printf '%s job %s start %s: %s\n' "$(date '+%F %T')" "$SLURM_JOB_ID" \
        "$((${SLURM_RESTART_COUNT:-0} + 1))" "$1"
}

# run_to_its_end COMMAND...: run a command and return its exit code, whatever signal comes.
# Slurm warns the batch script together with its steps, and a shell without a trap would end. After
# the command the signals are ignored: bash 5.2 that runs a trap in $(...) may end with "unexpected
# EOF", and the job would not be requeued.
run_to_its_end() {
    local process code warned
    trap 'warned=yes' TERM USR1
    "$@" &
    process=$!
    while true; do
        warned=
        code=0
        wait "$process" || code=$?
        if [ -z "$warned" ]; then
            trap '' TERM USR1
            return "$code"
        fi
    done
}

# ask_slurm COMMAND...: run a command of Slurm's, again while it fails: a controller that restarts, or is
# busy with other jobs of a preemption, does not answer for minutes. The signals are ignored by then.
ask_slurm() {
    local tries=20
    until "$@"; do
        if ((--tries == 0)); then return 1; fi
        sleep 30
    done
}

# may_requeue: whether another start is for this script to decide on; says why not.
may_requeue() {
    local state
    if [ "$REQUEUE" = no ]; then
        say "not requeued: REQUEUE=no"
        return 1
    fi
    # A cancelled job must stay cancelled, and one that Slurm requeues is no longer running.
    if ! state="$(ask_slurm squeue --noheader --job "$SLURM_JOB_ID" --format %T)"; then
        say "not requeued: Slurm did not answer for ten minutes"
        exit 1 # no end of a training that others may wait for
    elif [ "$state" != RUNNING ]; then
        say "left to Slurm: the job is $state"
        return 1
    fi
}

# requeue_job: have Slurm start this job again, unless that was decided elsewhere already.
requeue_job() {
    may_requeue || return 0
    say "requeued"
    ask_slurm scontrol requeue "$SLURM_JOB_ID" && return
    say "not requeued: scontrol failed for ten minutes"
    exit 1 # no end of a training that others may wait for
}
