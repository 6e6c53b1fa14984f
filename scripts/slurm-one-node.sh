#!/usr/bin/env bash
# A SLURM cluster of one node on this machine, to try the cluster jobs on: Debian or Ubuntu, as root, without systemd.
# Start it again to restart the daemons; `scripts/slurm-one-node.sh stop` ends them.
set -euo pipefail

stop() {
  pkill -x slurmctld || true
  pkill -x slurmd || true
  pkill -x munged || true
  sleep 1
}

if [ "${1:-start}" = stop ]; then
  stop
  exit
fi

if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge
fi
stop

name=$(hostname -s)
memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
[ -f /etc/munge/munge.key ] || mungekey --create
install -d -o munge -g munge -m 755 /run/munge
chown munge:munge /etc/munge/munge.key
install -d /etc/slurm /var/spool/slurmctld /var/spool/slurmd /var/log/slurm
cat >/etc/slurm/slurm.conf <<CONF
ClusterName=one
SlurmctldHost=$name(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
KillWait=30
NodeName=$name NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF

munged --force
slurmctld -c
slurmd -N "$name"
for _ in $(seq 30); do
  if [ "$(sinfo --noheader --format=%T)" = idle ]; then
    sinfo
    exit
  fi
  sleep 1
done
echo "the node does not come up: see /var/log/slurm" >&2
exit 1
