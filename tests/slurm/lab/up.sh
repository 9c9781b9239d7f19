#!/usr/bin/env bash
# A real Slurm cluster of several virtual nodes on this one machine: munged, slurmctld, one slurmd per node. No systemd, no cgroups.
#   apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge     (Debian bookworm: 22.05.8)
#   ./up.sh && . /tmp/slurm-lab/env.sh && sinfo ;  ./down.sh
# Idempotent: says so and exits 0 when the same cluster is already up; cleans and restarts when it is half up.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd); . "$here/lib.sh"
NODES=${NODES:-2} CPUS=${CPUS:-16} MEM=${MEM:-200000} GPUS=${GPUS:-8} GPU_TYPE=${GPU_TYPE:-h100}
NS=${NS:-auto}        # ns: each node has its own hostname, pids, /etc/hosts, /etc/slurm (root); plain: bare slurmds on the host
NET=${NET:-auto}      # veth: each node has its own network namespace, 10.77.0.N on a private bridge (root); lo: all are 127.0.0.1, ports differ
ACCT=${ACCT:-none}    # none: jobcomp/filetxt only; dbd: mariadbd (socket only) + slurmdbd, so that sacct works
GRES_FILES=${GRES_FILES:-1}   # 1: fake device files (GPU indexes and CUDA_VISIBLE_DEVICES per task); 0: Count only
PRIVATE=${PRIVATE-/tmp/local}   # folders that are node-local (bind-mounted per node; ns mode only); space-separated, may be empty
BASE=${BASE:-16800}   # ports: slurmctld BASE+17, slurmdbd BASE+19, slurmd of node N BASE+100+N
export PATH=/usr/sbin:/usr/bin:/sbin:/bin:$PATH
for b in munged slurmctld slurmd; do command -v $b >/dev/null || { echo "missing $b: apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge" >&2; exit 1; }; done

[ "$ACCT" != dbd ] || command -v mariadb-install-db >/dev/null || { echo "ACCT=dbd needs: apt-get install -y --no-install-recommends slurmdbd slurm-wlm-mysql-plugin mariadb-server-core mariadb-client-core" >&2; exit 1; }
me=$(id -un) host=$(hostname -s) first=node1
[ "$NODES" -gt 1 ] && names="node[1-$NODES]" || names=node1
if [ "$NS" = auto ]; then NS=plain; unshare -u -m -p -f --mount-proc true 2>/dev/null && NS=ns; fi
if [ "$NET" = auto ]; then NET=lo; [ "$NS" = ns ] && command -v ip >/dev/null && ip link add slabt type bridge 2>/dev/null && ip link del slabt && ip link add slabt type veth peer name slabu 2>/dev/null && ip link del slabt && NET=veth; fi
[ "$NET" = veth ] && [ "$NS" != ns ] && { echo "NET=veth needs NS=ns (root)" >&2; exit 1; }
want="$NODES $CPUS $MEM $GPUS $GPU_TYPE $NS $NET $ACCT $GRES_FILES $PRIVATE $BASE"
daemons="munged slurmctld $(seq -f 'node%g' "$NODES" | tr '\n' ' ')"; [ "$ACCT" = dbd ] && daemons="mariadbd slurmdbd $daemons"
if compgen -G "$RUN/*.pid" >/dev/null; then
  up=1; for d in $daemons; do pid_of "$d" >/dev/null || up=0; done
  if [ $up = 1 ] && [ "$(cat "$RUN/want" 2>/dev/null)" = "$want" ] && SLURM_CONF=$CONF scontrol ping | grep -q 'is UP'; then echo "already up: . $LAB/env.sh"; exit 0; fi
  "$here/down.sh"
fi

umask 022
mkdir -p "$LAB"/{etc,log,run,state,spool,dev,jobs,local}
: >"$LAB/etc/cgroup.conf"
ip_of() { if [ "$NET" = veth ]; then echo "10.77.0.$1"; else echo 127.0.0.1; fi; }
ctl_ip=127.0.0.1 dbd_ip=127.0.0.1 comm=NoInAddrAny,NoCtldInAddrAny; [ "$NET" = veth ] && ctl_ip=10.77.0.254 dbd_ip=10.77.0.253 comm=NoCtldInAddrAny
[ "$NS" = plain ] && nodehost="NodeHostname=$host" || nodehost=
last=$NODES; if [ "$NODES" -gt 1 ]; then addrs="$(ip_of "[1-$last]")" ports="[$((BASE+101))-$((BASE+100+last))]"; else addrs=$(ip_of 1) ports=$((BASE+101)); fi

# ---- munge: a key of our own, a socket of our own
[ -s "$LAB/etc/munge.key" ] || { (umask 077; head -c 1024 /dev/urandom >"$LAB/etc/munge.key"); }

# ---- slurm.conf, gres.conf
acct="AccountingStorageType=accounting_storage/none"
[ "$ACCT" = dbd ] && acct="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$dbd_ip
AccountingStoragePass=$RUN/munge.socket.2
AccountingStoragePort=$((BASE+19))
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment"
cat >"$CONF" <<E
ClusterName=lab
SlurmctldHost=$host($ctl_ip)
SlurmctldPort=$((BASE+17))
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
AuthInfo=socket=$RUN/munge.socket.2,cred_expire=5   # cred_expire is also how long a requeued job waits (default 120 s)
CredType=cred/munge
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldPidFile=$RUN/slurmctld.slurmpid
SlurmdPidFile=$RUN/%n.slurmpid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
CommunicationParameters=$comm   # listen on the loopback (or the bridge) only
ProctrackType=proctrack/linuxproc      # no cgroups
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides      # believe the CPUs and memory written here, not what the machine has
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
GresTypes=gpu
ReturnToService=2                      # a node that comes back is used again
SlurmdTimeout=12                       # a silent slurmd: node DOWN, its jobs requeued (default 300)
SlurmctldTimeout=30
InactiveLimit=0
KillWait=5                             # SIGTERM to SIGKILL (default 30)
UnkillableStepTimeout=30
MinJobAge=3600                         # scontrol show job answers for an hour after the end
EnforcePartLimits=ALL                  # refuse what can never run at once, instead of leaving it pending
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=100000,bf_interval=2,bf_continue,requeue_setup_env_fail
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal        # a job submitted with --signal gets that signal when it is preempted too
JobCompType=jobcomp/filetxt
JobCompLoc=$LAB/log/jobcomp.txt
$acct
NodeName=$names NodeAddr=$addrs $nodehost Port=$ports CPUs=$CPUS Sockets=2 CoresPerSocket=$((CPUS/2)) ThreadsPerCore=1 RealMemory=$MEM Gres=gpu:$GPU_TYPE:$GPUS State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=cpu Nodes=ALL MaxTime=INFINITE DefaultTime=60 PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=short Nodes=ALL MaxTime=10 MaxNodes=2 DefaultTime=5 PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=preempt Nodes=ALL MaxTime=INFINITE DefaultTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=15 State=UP
E
gresfiles=
if [ "$GRES_FILES" = 1 ]; then                     # GPU files must be character devices: clones of /dev/null made here, else terminals that exist
  for i in $(seq 0 $((GPUS-1))); do [ -c "$LAB/dev/nvidia$i" ] || mknod -m 666 "$LAB/dev/nvidia$i" c 1 3 2>/dev/null || break; done
  if [ -c "$LAB/dev/nvidia$((GPUS-1))" ]; then gresfiles="File=$LAB/dev/nvidia[0-$((GPUS-1))]"
  elif [ -c "/dev/tty$((GPUS-1))" ]; then gresfiles="File=/dev/tty[0-$((GPUS-1))]"; fi
fi
printf 'AutoDetect=off\nNodeName=%s Name=gpu Type=%s %s\n' "$names" "$GPU_TYPE" "${gresfiles:-Count=$GPUS}" >"$LAB/etc/gres.conf"
echo "export SLURM_CONF=$CONF SLURM_LAB=$LAB" >"$LAB/env.sh"
export SLURM_CONF=$CONF
{ echo "127.0.0.1 localhost"; echo "$ctl_ip $host"; for i in $(seq "$NODES"); do echo "$(ip_of "$i") node$i"; done; } >"$LAB/etc/hosts"
if [ "$NS" = plain ] && [ -w /etc/hosts ]; then    # node names must resolve inside jobs; ns mode binds its own /etc/hosts instead
  for i in $(seq "$NODES"); do grep -q "node$i # slurm-lab" /etc/hosts || echo "$(ip_of "$i") node$i # slurm-lab" >>/etc/hosts; done
fi
if [ "$NET" = veth ]; then
  ip link show slab0 >/dev/null 2>&1 || { ip link add slab0 type bridge; ip addr add 10.77.0.254/24 dev slab0; ip link set slab0 up; }
fi

# ---- pyxis: --container-image and the rest are accepted (and shown to the task), when gcc and libslurm-dev are here
rm -f "$LAB/etc/plugstack.conf"
if [ -f /usr/include/slurm/spank.h ] && command -v gcc >/dev/null; then
  [ -f "$LAB/pyxis_stub.so" ] || gcc -O1 -shared -fPIC -o "$LAB/pyxis_stub.so" "$here/pyxis_stub.c"
  echo "optional $LAB/pyxis_stub.so" >"$LAB/etc/plugstack.conf"
fi

# ---- --mpi=pmix works when libpmix2 is here: the plugin opens libpmix.so, which only the -dev package has; its folder must be node-local
d=/usr/lib/x86_64-linux-gnu/pmix2/lib
if [ -e $d/libpmix.so.2 ]; then [ -e $d/libpmix.so ] || ln -s libpmix.so.2 $d/libpmix.so 2>/dev/null || true
  [ -z "${PRIVATE%% *}" ] || echo "PMIxCliTmpDirBase=${PRIVATE%% *}" >"$LAB/etc/mpi.conf"; fi

# ---- daemons. Each is started in its own session, its pid and start time kept in $RUN/NAME.pid
die() { echo "up.sh: $1" >&2; for f in "$LAB"/log/*.out; do echo "--- $f"; tail -n 4 "$f"; done >&2; exit 1; }
waitfor() { local msg=$1 end=$((SECONDS+20)); shift; until "$@"; do [ $SECONDS -lt $end ] || die "$msg"; sleep 0.05; done; }
bg munged munged --foreground --force --num-threads=4 --key-file="$LAB/etc/munge.key" --socket="$RUN/munge.socket.2" --pid-file="$RUN/munged.mpid" --seed-file="$RUN/munge.seed" --log-file="$LAB/log/munged.log"
waitfor "munged did not start" eval "munge -S $RUN/munge.socket.2 -n >/dev/null 2>&1"
[ "$ACCT" = dbd ] && . "$here/acct.sh"
echo "$want" >"$RUN/want"; echo "$NET" >"$RUN/net"
"$here/node.sh" ctld-start
waitfor "slurmctld did not answer" eval "timeout 2 scontrol ping 2>/dev/null | grep -q 'is UP'"
for i in $(seq "$NODES"); do "$here/node.sh" start "node$i" "$NS" "$NET" "$(ip_of "$i")" "$PRIVATE"; done
waitfor "nodes not up" eval '[ "$(timeout 5 sinfo -h -N -p gpu -r -t idle,mix,alloc,comp -o %N 2>/dev/null | wc -l)" = "$NODES" ]'
echo "up: $NODES nodes ($NS, $NET). Now:  . $LAB/env.sh"
