#!/usr/bin/env bash
# A real Slurm on one machine, to try the job scripts on: two nodes, and two partitions of which
# one preempts the other. Touches no Slurm that is there already.
#
#   scripts/slurm/local_cluster.sh start FOLDER    start it; its files are in FOLDER
#   export SLURM_CONF=FOLDER/slurm.conf            have sbatch, squeue, ... use it
#   scripts/slurm/local_cluster.sh stop FOLDER     end its jobs and itself
#
# Needs root, and on Debian or Ubuntu: apt-get install --no-install-recommends slurm-wlm munge
# It reads two variables:
#
#   PROCTRACK   how Slurm tracks and signals processes. cgroup, as clusters do: the process that
#               srun started is signalled, and the rest only killed; needs a writable freezer
#               cgroup (version 1). linuxproc: all of them are signalled, and with SIGUSR1 before a
#               preemption (docs/slurm.md says why). Default: cgroup if it can.
#   PORT        first of three ports (default: 26817)
set -euo pipefail

die() {
    echo "local_cluster.sh: error: $1" >&2
    exit 2
}

FREEZER=/sys/fs/cgroup/freezer

configure() {
    local host megabytes slurmd_port=$((PORT + 1))
    host="$(hostname -s)"
    megabytes="$(awk '/^MemTotal:/ { print int($2 / 1024) }' /proc/meminfo)"
    cat >"$FOLDER/slurm.conf" <<END
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
# A requeued job waits for its old credential to expire; Slurm's default is 120 seconds.
AuthInfo=socket=$FOLDER/munge.sock,cred_expire=15
# On a busy machine. A message to end the last start that is sent again would end the new one.
MessageTimeout=60
SchedulerParameters=sched_interval=2,bf_interval=2
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool-%n
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/slurmd-%n.pid
SlurmctldLogFile=$FOLDER/slurmctld.log
SlurmdLogFile=$FOLDER/slurmd-%n.log
ProctrackType=proctrack/$PROCTRACK
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
# pretrain.sh takes its port from the job's id: not the same one as another cluster's here.
FirstJobId=$((PORT / 2))
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=DEFAULT CPUs=$(nproc) RealMemory=$megabytes
NodeName=node[0-1] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$slurmd_port-$((PORT + 2))]
PartitionName=train Nodes=ALL Default=YES PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
END
    if [ "$PROCTRACK" = cgroup ]; then
        printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=%s\n' "${FREEZER%/*}" >"$FOLDER/cgroup.conf"
    else
        echo SlurmctldParameters=preempt_send_user_signal >>"$FOLDER/slurm.conf"
    fi
}

start() {
    local program node
    for program in munged slurmctld slurmd sbatch; do
        command -v $program >/dev/null || die "no $program on the PATH; on Debian or Ubuntu: \
apt-get install --no-install-recommends slurm-wlm munge"
    done
    [ "$(id -u)" = 0 ] || die "slurmd must be started by root"
    [ ! -e "$FOLDER/slurm.conf" ] || die "$FOLDER has a cluster already; stop it and remove the folder"
    [[ "$PORT" =~ ^[0-9]{4,5}$ ]] || die "PORT='$PORT': must be a number from 1024 to 65533"
    if [ -z "${PROCTRACK:-}" ]; then
        PROCTRACK=linuxproc
        if [ -w "$FREEZER/cgroup.procs" ]; then PROCTRACK=cgroup; fi
    fi
    mkdir -p "$FOLDER/state"
    (umask 077 && head -c 128 /dev/urandom >"$FOLDER/munge.key")
    configure
    trap end_daemons EXIT # unless all of it comes up
    # Its own key and socket; --force: the folder may be one that others can write to, like /tmp.
    munged --force --socket "$FOLDER/munge.sock" --key-file "$FOLDER/munge.key" \
        --pid-file "$FOLDER/munged.pid" --log-file "$FOLDER/munged.log" \
        --seed-file "$FOLDER/munged.seed" 2>"$FOLDER/munged.err" ||
        die "munged did not start: $(tail -n 1 "$FOLDER/munged.err")"
    export SLURM_CONF="$FOLDER/slurm.conf"
    slurmctld || die "slurmctld did not start; see $FOLDER/slurmctld.log"
    for node in node0 node1; do
        slurmd -N $node || die "slurmd did not start; see $FOLDER/slurmd-$node.log"
    done
    for _ in {1..100}; do
        if [ "$(sinfo --noheader --states idle --partition train --format %D 2>/dev/null)" = 2 ]; then
            trap - EXIT
            echo "$(slurmctld -V), proctrack/$PROCTRACK, nodes node0 and node1; use it with"
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.2
    done
    die "the nodes did not come up in 20 s; see $FOLDER/*.log"
}

# end_process FILE: end the process whose id is in a file, and wait for it.
end_process() {
    local process
    [ -f "$1" ] || return 0
    process="$(cat "$1")"
    kill "$process" 2>/dev/null || return 0
    for _ in {1..100}; do
        if ! kill -0 "$process" 2>/dev/null; then return 0; fi
        sleep 0.1
    done
    kill -KILL "$process" 2>/dev/null || true
}

end_daemons() {
    local file
    for file in slurmd-node0 slurmd-node1 slurmctld munged; do end_process "$FOLDER/$file.pid"; done
    find $FREEZER/slurm_node[01] -depth -type d -exec rmdir {} + 2>/dev/null || true
    rm -f "$FOLDER/slurm.conf"
}

stop() {
    [ -f "$FOLDER/slurm.conf" ] || die "$FOLDER has no cluster"
    export SLURM_CONF="$FOLDER/slurm.conf"
    if [ -f "$FOLDER/slurmctld.pid" ]; then
        scancel --user root || true
        for _ in {1..150}; do
            if [ -z "$(squeue --noheader 2>/dev/null)" ]; then break; fi
            sleep 0.2
        done
    fi
    end_daemons
}

[ $# = 2 ] || die "give start or stop, and a folder"
FOLDER="$(realpath -m -- "$2")"
PORT="${PORT:-26817}"
case "$1" in
    start) start ;;
    stop) stop ;;
    *) die "'$1': give start or stop, and a folder" ;;
esac
