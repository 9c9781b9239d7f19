#!/usr/bin/env bash
# tests/slurm/run.sh [pytest arguments]: the tests against a real SLURM: a controller and several nodes on this machine,
# in namespaces of their own. Installs SLURM from Debian where it is missing. Any number of these may run at once.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PATH=$PATH:/usr/sbin:/sbin
need=(slurmctld slurmd sbatch munged ip shellcheck faketime)
missing=()
for program in "${need[@]}"; do command -v "$program" >/dev/null || missing+=("$program"); done
if [ ${#missing[@]} -gt 0 ]; then
  echo "installing SLURM from Debian (missing: ${missing[*]})" >&2
  sudo=(); [ "$(id -u)" = 0 ] || sudo=(sudo)
  "${sudo[@]}" apt-get update -q
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
    slurmctld slurmd slurm-client munge iproute2 shellcheck faketime
fi
cd "$here/../.."
python=${PYTHON:-.venv/bin/python}
# All of them, unless the arguments name files.
tests=(tests/slurm)
for argument in "$@"; do [ ! -e "${argument%%::*}" ] || tests=(); done
NODES=${NODES:-3} GPUS=${GPUS:-8} exec "$here/lab/box.sh" "$python" -m pytest -m slurm "${tests[@]}" "$@"
