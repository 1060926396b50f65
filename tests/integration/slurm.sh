#!/usr/bin/env bash
# A Slurm of one node on this machine, for root: `slurm.sh start FOLDER`, later `slurm.sh stop FOLDER`.
# Nothing outside FOLDER is touched; commands find the cluster through SLURM_CONF=FOLDER/slurm.conf.
set -euo pipefail
folder=$2
export SLURM_CONF=$folder/slurm.conf
if [ "$1" = stop ]; then
  for daemon in slurmd slurmctld munged; do
    [ -f "$folder/$daemon.pid" ] && kill "$(cat "$folder/$daemon.pid")" || true
  done
  exit 0
fi
mkdir -p "$folder/state" "$folder/spool"
chmod 755 "$folder"
head -c 128 /dev/urandom > "$folder/munge.key"
chmod 600 "$folder/munge.key"
cat > "$SLURM_CONF" <<CONF
ClusterName=sddx
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
NodeName=$(hostname) NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
  --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
slurmctld
slurmd
for _ in $(seq 60); do
  sinfo --noheader --format=%t 2> /dev/null | grep -q '^idle$' && exit 0
  sleep 0.5
done
tail -n 20 "$folder"/*.log >&2
echo "no idle Slurm node within 30 s" >&2
exit 1
