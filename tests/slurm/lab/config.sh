# shellcheck shell=bash disable=SC2154
# Sourced by up.sh: the configuration of SLURM 22.05 without cgroups, systemd or accounting, on one machine.

write_munge_key() (
  umask 077
  [ -s "$LAB/etc/munge.key" ] || head -c 1024 /dev/urandom >"$LAB/etc/munge.key"
)

accounting_lines() {
  if [ "$ACCT" != dbd ]; then
    echo "AccountingStorageType=accounting_storage/none"
    return
  fi
  cat <<E
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$dbd_ip
AccountingStoragePass=$RUN/munge.socket.2
AccountingStoragePort=$((BASE + 19))
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment
E
}

# Several lines want their reasons:
#   AuthInfo                  cred_expire is also how long a requeued job waits (120 s by default)
#   CommunicationParameters   listen on the loopback, or the bridge, only
#   SlurmdParameters          believe the CPUs and memory written here, not what the machine has
#   ReturnToService           a node that comes back is used again
#   SlurmdTimeout             after so long a silent node is DOWN and its jobs are requeued (300 s by default)
#   KillWait                  from SIGTERM to SIGKILL (30 s by default)
#   MinJobAge                 scontrol tells of a job for an hour after its end
#   EnforcePartLimits         what can never run is refused at once, instead of waiting for ever
#   SlurmctldParameters       a job that is preempted gets the signal that it asked for with --signal
slurm_conf() {
  cat <<E
ClusterName=lab
SlurmctldHost=$host($ctl_ip)
SlurmctldPort=$((BASE + 17))
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
AuthInfo=socket=$RUN/munge.socket.2,cred_expire=5
CredType=cred/munge
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldPidFile=$RUN/slurmctld.slurmpid
SlurmdPidFile=$RUN/%n.slurmpid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
CommunicationParameters=$communication
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=12
SlurmctldTimeout=30
InactiveLimit=0
KillWait=5
UnkillableStepTimeout=30
MinJobAge=3600
EnforcePartLimits=ALL
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=$(scheduler_parameters)
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobCompType=jobcomp/filetxt
JobCompLoc=$LAB/log/jobcomp.txt
$(accounting_lines)
NodeName=$names NodeAddr=$addresses $node_host Port=$ports $(node_resources) State=UNKNOWN
$(partition gpu "$usual" Default=YES MaxTime=INFINITE)
$(partition cpu "$usual" MaxTime=INFINITE)
$(partition short "PriorityTier=10 PreemptMode=OFF DefaultTime=5" MaxTime=10 MaxNodes=2)
$(partition preempt "PriorityTier=1 PreemptMode=REQUEUE GraceTime=15 DefaultTime=60" MaxTime=INFINITE)
E
}

# Jobs start within a second or two of their submission.
scheduler_parameters() {
  local words=(batch_sched_delay=0 sched_interval=2 sched_min_interval=100000 bf_interval=2 bf_continue
    requeue_setup_env_fail)
  (IFS=, && echo "${words[*]}")
}

node_resources() {
  echo "CPUs=$CPUS Sockets=2 CoresPerSocket=$((CPUS / 2)) ThreadsPerCore=1 RealMemory=$MEM Gres=gpu:$GPU_TYPE:$GPUS"
}

usual="PriorityTier=10 PreemptMode=OFF DefaultTime=60"
partition() { echo "PartitionName=$1 Nodes=ALL ${*:3} $2 State=UP"; }

# GPU files must be character devices: clones of /dev/null made here, else terminals that exist.
gpu_files() {
  local index
  [ "$GRES_FILES" = 1 ] || return 0
  for index in $(seq 0 $((GPUS - 1))); do
    [ -c "$LAB/dev/nvidia$index" ] || mknod -m 666 "$LAB/dev/nvidia$index" c 1 3 2>/dev/null || break
  done
  if [ -c "$LAB/dev/nvidia$((GPUS - 1))" ]; then
    echo "File=$LAB/dev/nvidia[0-$((GPUS - 1))]"
  elif [ -c "/dev/tty$((GPUS - 1))" ]; then
    echo "File=/dev/tty[0-$((GPUS - 1))]"
  fi
}

gres_conf() {
  local files
  files=$(gpu_files)
  printf 'AutoDetect=off\nNodeName=%s Name=gpu Type=%s %s\n' "$names" "$GPU_TYPE" "${files:-Count=$GPUS}"
}

hosts_file() {
  local index
  echo "127.0.0.1 localhost"
  echo "$ctl_ip $host"
  for index in $(seq "$NODES"); do echo "$(ip_of "$index") node$index"; done
}

# Node names must resolve inside jobs; with namespaces each node has its own file instead.
add_host_names() {
  local index
  if [ "$NS" != plain ] || [ ! -w /etc/hosts ]; then return 0; fi
  for index in $(seq "$NODES"); do
    grep -q "node$index # slurm-lab" /etc/hosts || echo "$(ip_of "$index") node$index # slurm-lab" >>/etc/hosts
  done
}

# --container-image and the rest are accepted, and shown to the task, where gcc and libslurm-dev are installed.
build_pyxis_stub() {
  rm -f "$LAB/etc/plugstack.conf"
  if [ ! -f /usr/include/slurm/spank.h ] || ! command -v gcc >/dev/null; then return 0; fi
  [ -f "$LAB/pyxis_stub.so" ] || gcc -O1 -shared -fPIC -o "$LAB/pyxis_stub.so" "$here/pyxis_stub.c"
  echo "optional $LAB/pyxis_stub.so" >"$LAB/etc/plugstack.conf"
}

# --mpi=pmix where libpmix2 is installed: the plugin opens libpmix.so, which only the -dev package has, and its folder
# must be node-local.
allow_pmix() {
  # shellcheck disable=SC2153  # PRIVATE is a setting of up.sh
  local folder=/usr/lib/x86_64-linux-gnu/pmix2/lib private=${PRIVATE%% *}
  [ -e $folder/libpmix.so.2 ] || return 0
  [ -e $folder/libpmix.so ] || ln -s libpmix.so.2 $folder/libpmix.so 2>/dev/null || true
  [ -z "$private" ] || echo "PMIxCliTmpDirBase=$private" >"$LAB/etc/mpi.conf"
}
