#!/bin/bash
# A real SLURM on this one machine, for tests: slurmctld, two slurmd (nodes n1 and n2) and a munged of their own.
#
#   tests/slurm_cluster.sh up DIR      install what is missing and start; the last line says what to export
#   tests/slurm_cluster.sh down DIR    cancel the jobs and stop what `up` started; DIR stays, with the logs
#
# Needs root and apt-get. But for the packages, everything is in DIR, and ports and munge socket are its own, so that a
# SLURM or munged that the machine has already goes on undisturbed.
set -euo pipefail
die() { echo "$1" >&2 && exit 2; }
[[ $# = 2 && $1 =~ ^(up|down)$ ]] || die "usage: $0 up|down DIR"
dir=$(realpath -m -- "$2")
# slurm.conf cannot quote a path, and slurmd's sockets in DIR have to fit into the 107 bytes of a socket's address.
[[ $dir =~ ^[A-Za-z0-9/._+-]{1,80}$ ]] || die "give a DIR of 80 plain characters at most, not $dir"
export SLURM_CONF=$dir/slurm.conf PATH=$PATH:/usr/sbin:/sbin

# The processes of this cluster. All have its SLURM_CONF in their environment, as the caller's shell may have too: so
# the daemons go by their names as well, and what runs in a job by a variable that slurmd sets.
ours() {
    local proc
    for proc in $(grep -slzxF "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ || true); do
        proc=${proc%/environ}
        if grep -sqxE 'munged|slurmctld|slurmscriptd|slurmd|slurmstepd' "$proc/comm" ||
            grep -sqz '^SLURMD_NODENAME=' "$proc/environ"; then
            echo "${proc#/proc/}"
        fi
    done
}

down() {
    local signal pids
    if [ -n "$(ours)" ] && timeout 10 scancel --partition=test 2>/dev/null; then
        for _ in {1..40}; do # jobs that ignore SIGTERM end after KillWait
            if [ -z "$(timeout 10 squeue --noheader 2>/dev/null)" ]; then break; fi
            sleep 0.5
        done
    fi
    for signal in TERM KILL; do
        mapfile -t pids < <(ours)
        kill -"$signal" "${pids[@]}" 2>/dev/null || true
        for _ in {1..20}; do
            if [ -z "$(ours)" ]; then return; fi
            sleep 0.5
        done
    done
    die "still there: $(ours)"
}

start() { # a daemon: in an environment of its own, which jobs would see, and without the caller's pipes
    env -i PATH="$PATH" SLURM_CONF="$SLURM_CONF" "$@" </dev/null >>"$dir/start.log" 2>&1
}

up() {
    local host memory port=16817
    [ -z "$(ours)" ] || die "$dir is up already"
    mkdir -p "$dir/state"
    trap 'tail -n 20 "$dir"/*.log >&2; down; exit 1' EXIT # until the nodes are idle
    if ! type munged slurmctld slurmd sbatch >/dev/null 2>&1; then
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
            apt-get install -y -qq --no-install-recommends slurm-wlm munge; } </dev/null >"$dir/apt.log" 2>&1
    fi
    host=$(hostname -s)
    memory=$(awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
    while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 3)); done # another of these is up
    # cred_expire: so long a requeued job waits before it may start again, 120 s unless told. linuxproc and task/none:
    # no cgroups, which belong to whatever runs the tests. config_overrides: 2 CPUs a node, whatever the machine has.
    cat >"$SLURM_CONF" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=5,bf_interval=5
JobRequeue=1
KillWait=10
OverTimeLimit=0
MinJobAge=3600
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1))-$((port + 2)) CPUs=2 RealMemory=$memory
PartitionName=test Nodes=n[1-2] Default=YES MaxTime=10 State=UP
END
    (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
    # --force: it complains when DIR is one that only its owner may enter
    start munged --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" --seed-file="$dir/munge.seed" \
        --pid-file="$dir/munged.pid" --log-file="$dir/munged.log"
    start slurmctld
    start slurmd -N n1
    start slurmd -N n2
    SECONDS=0
    until [ "$(timeout 5 sinfo --noheader --format='%D %t' 2>/dev/null)" = "2 idle" ]; do
        ((SECONDS < 60)) || exit 1
        sleep 0.5
    done
    trap - EXIT
    echo "export SLURM_CONF=$SLURM_CONF"
}

"$1"
