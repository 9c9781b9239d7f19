#!/usr/bin/env bash
# A real SLURM of several nodes on this one machine: munged, slurmctld and a slurmd for each node, without systemd.
#   up.sh && . /tmp/slurm-lab/env.sh && sinfo;  down.sh
# Packages (Debian 12, SLURM 22.05): slurmctld slurmd slurm-client munge iproute2
# Says so where the same cluster is up already, and starts anew where it is half up.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tests/slurm/lab/lib.sh
. "$here/lib.sh"
# shellcheck source=tests/slurm/lab/config.sh
. "$here/config.sh"

NODES=${NODES:-2} CPUS=${CPUS:-16} MEM=${MEM:-200000} GPUS=${GPUS:-8} GPU_TYPE=${GPU_TYPE:-h100}
# ns: a node has its own host name, processes, /etc/hosts and /etc/slurm;  plain: bare slurmds on the host.
NS=${NS:-auto}
# veth: a node has its own network, 10.77.0.N on a private bridge;  lo: all are 127.0.0.1 with different ports.
NET=${NET:-auto}
# dbd: MariaDB and slurmdbd, so that sacct works;  none: jobcomp/filetxt only.
ACCT=${ACCT:-none}
# 1: device files, so that tasks get GPU numbers and CUDA_VISIBLE_DEVICES;  0: GPUs are only counted.
GRES_FILES=${GRES_FILES:-1}
# Folders that are a node's own, separated by blanks; may be empty.
PRIVATE=${PRIVATE-/tmp/local}
# Ports: slurmctld BASE+17, slurmdbd BASE+19, slurmd of node N BASE+100+N.
BASE=${BASE:-16800}
export PATH=/usr/sbin:/usr/bin:/sbin:/bin:$PATH

die() {
  local log
  echo "up.sh: $1" >&2
  for log in "$LAB"/log/*.out; do
    [ -e "$log" ] || continue
    echo "--- $log" >&2
    tail -n 4 "$log" >&2
  done
  exit 1
}

# waitfor COMPLAINT COMMAND...: until the command succeeds.
waitfor() {
  local complaint=$1 end=$((SECONDS + 20))
  shift
  until "$@"; do
    [ $SECONDS -lt $end ] || die "$complaint"
    sleep 0.05
  done
}

need() {
  local packages=$1 program
  shift
  for program in "$@"; do
    command -v "$program" >/dev/null || {
      echo "up.sh: $program is missing: apt-get install -y --no-install-recommends $packages" >&2
      exit 1
    }
  done
}

can_bridge() {
  command -v ip >/dev/null && ip link add slabt type bridge 2>/dev/null && ip link del slabt &&
    ip link add slabt type veth peer name slabu 2>/dev/null && ip link del slabt
}

choose_mode() {
  if [ "$NS" = auto ]; then
    NS=plain
    ! unshare -u -m -p -f --mount-proc true 2>/dev/null || NS=ns
  fi
  if [ "$NET" = auto ]; then
    NET=lo
    if [ "$NS" = ns ] && can_bridge; then NET=veth; fi
  fi
  if [ "$NET" = veth ] && [ "$NS" != ns ]; then die "NET=veth needs NS=ns (root)"; fi
}

ip_of() { if [ "$NET" = veth ]; then echo "10.77.0.$1"; else echo 127.0.0.1; fi; }

# Names, addresses and ports that the configuration is made of.
# shellcheck disable=SC2034
name_things() {
  me=$(id -un) host=$(hostname -s) names=node1 node_host=
  addresses=$(ip_of 1) ports=$((BASE + 101))
  if [ "$NODES" -gt 1 ]; then
    names="node[1-$NODES]" addresses=$(ip_of "[1-$NODES]") ports="[$((BASE + 101))-$((BASE + 100 + NODES))]"
  fi
  [ "$NS" != plain ] || node_host="NodeHostname=$host"
  ctl_ip=127.0.0.1 dbd_ip=127.0.0.1 communication=NoInAddrAny,NoCtldInAddrAny
  if [ "$NET" = veth ]; then ctl_ip=10.77.0.254 dbd_ip=10.77.0.253 communication=NoCtldInAddrAny; fi
}

leave_if_up() {
  local daemon daemons=(munged slurmctld) up=1
  compgen -G "$RUN/*.pid" >/dev/null || return 0
  mapfile -t -O 2 daemons < <(seq -f 'node%g' "$NODES")
  [ "$ACCT" != dbd ] || daemons+=(mariadbd slurmdbd)
  for daemon in "${daemons[@]}"; do pid_of "$daemon" >/dev/null || up=0; done
  if [ $up = 1 ] && [ "$(cat "$RUN/want" 2>/dev/null)" = "$want" ] &&
    SLURM_CONF=$CONF scontrol ping | grep -q 'is UP'; then
    echo "already up: . $LAB/env.sh"
    exit 0
  fi
  "$here/down.sh"
}

write_configuration() {
  umask 022
  mkdir -p "$LAB"/{etc,log,run,state,spool,dev,jobs,local}
  : >"$LAB/etc/cgroup.conf"
  write_munge_key
  slurm_conf >"$CONF"
  gres_conf >"$LAB/etc/gres.conf"
  hosts_file >"$LAB/etc/hosts"
  add_host_names
  build_pyxis_stub
  allow_pmix
  echo "export SLURM_CONF=$CONF SLURM_LAB=$LAB" >"$LAB/env.sh"
}

make_bridge() {
  if [ "$NET" != veth ] || ip link show slab0 >/dev/null 2>&1; then return 0; fi
  ip link add slab0 type bridge
  ip addr add 10.77.0.254/24 dev slab0
  ip link set slab0 up
}

munge_answers() { munge -S "$RUN/munge.socket.2" -n >/dev/null 2>&1; }
controller_answers() { timeout 2 scontrol ping 2>/dev/null | grep -q 'is UP'; }
nodes_are_up() {
  [ "$(timeout 5 sinfo -h -N -p gpu -r -t idle,mix,alloc,comp -o %N 2>/dev/null | wc -l)" = "$NODES" ]
}

start_munged() {
  bg munged munged --foreground --force --num-threads=4 --key-file="$LAB/etc/munge.key" \
    --socket="$RUN/munge.socket.2" --pid-file="$RUN/munged.mpid" --seed-file="$RUN/munge.seed" \
    --log-file="$LAB/log/munged.log"
  waitfor "munged did not start" munge_answers
}

start_nodes() {
  local index
  for index in $(seq "$NODES"); do
    "$here/node.sh" start "node$index" "$NS" "$NET" "$(ip_of "$index")" "$PRIVATE"
  done
  waitfor "nodes not up" nodes_are_up
}

need "slurmctld slurmd slurm-client munge" munged slurmctld slurmd
if [ "$ACCT" = dbd ]; then
  need "slurmdbd slurm-wlm-mysql-plugin mariadb-server-core mariadb-client-core" mariadb-install-db
fi
choose_mode
name_things
want="$NODES $CPUS $MEM $GPUS $GPU_TYPE $NS $NET $ACCT $GRES_FILES $PRIVATE $BASE"
leave_if_up
write_configuration
make_bridge
export SLURM_CONF=$CONF
start_munged
if [ "$ACCT" = dbd ]; then
  # shellcheck source=tests/slurm/lab/acct.sh
  . "$here/acct.sh"
fi
echo "$want" >"$RUN/want"
echo "$NET" >"$RUN/net"
"$here/node.sh" ctld-start
waitfor "slurmctld did not answer" controller_answers
start_nodes
echo "up: $NODES nodes ($NS, $NET). Now:  . $LAB/env.sh"
