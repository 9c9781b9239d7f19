#!/usr/bin/env bash
# One task of a training's step, on its node and inside the container:    training_task.sh ATTEMPT
# ATTEMPT/task.env, which the supervisor wrote, sets up the environment and the array `training`.
set -eo pipefail
# srun and scancel send USR1 to every process of the step. Ignored here and so in torchrun's agent, which it would kill;
# the ranks put their own handler in its place.
trap '' USR1
ulimit -c 0
export MV_ATTEMPT=$1

# Caches of compilers on the node itself: thousands of ranks must not lock files of a shared file system.
local_folder=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/megatron-video-$(id -u)-$SLURM_JOB_ID
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$local_folder/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$local_folder/inductor}
export CUDA_CACHE_PATH=${CUDA_CACHE_PATH:-$local_folder/cuda}

# shellcheck source=/dev/null
source "$MV_ATTEMPT/task.env"

if [ "${SLURM_LOCALID:-0}" = 0 ] && command -v nvidia-smi >/dev/null; then
  timeout 60 nvidia-smi -q >"$MV_ATTEMPT/nodes/$SLURMD_NODENAME.nvidia-smi.txt" 2>&1 || true
fi
if [ "$MV_LAUNCHER" = srun ]; then
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  export GROUP_RANK=$SLURM_NODEID LOCAL_WORLD_SIZE=$MV_RANKS_PER_NODE
else
  # Said rather than guessed from host names, which may resolve to another of the node's addresses.
  is_host=0
  [ "$SLURMD_NODENAME" != "$MV_FIRST_NODE" ] || is_host=1
  training=("${training[@]/@IS_HOST@/$is_host}")
  training=("${training[@]/@NODE@/$SLURMD_NODENAME}")
fi
exec "${training[@]}"
