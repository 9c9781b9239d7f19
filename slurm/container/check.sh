#!/usr/bin/env bash
# Checks an image on a machine with GPUs:    slurm/container/check.sh IMAGE
# IMAGE: a .sif file (apptainer), a .sqsh file (enroot), else the name of a docker image. Exit code 0: versions are as
# pinned, `megatron-video doctor` is content, torch sees the GPUs, Transformer Engine and apex load.
set -euo pipefail
image=${1:-}
[ -n "$image" ] || {
  sed -n '2,4p' "$0" >&2
  exit 2
}

enter() {
  case $image in
    *.sif) apptainer exec --nv --cleanenv "$image" "$@" ;;
    *.sqsh)
      local name=megatron-video-check-$$
      enroot create --name "$name" "$image" >/dev/null
      enroot start "$name" "$@" || {
        local code=$?
        enroot remove --force "$name" >/dev/null
        return "$code"
      }
      enroot remove --force "$name" >/dev/null
      ;;
    *) docker run --rm --gpus all --ipc host "$image" "$@" ;;
  esac
}

enter python /opt/megatron-video/slurm/container/check_versions.py /opt/container/requirements.txt
enter megatron-video doctor
enter python -c '
import apex.optimizers, megatron.core, nvidia.dali, torch, transformer_engine.pytorch
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, NCCL {torch.cuda.nccl.version()}")
print(f"{torch.cuda.device_count()} GPUs: {torch.cuda.get_device_name(0)}")
'
