#!/usr/bin/env bash
# Builds the image of trainings:    slurm/container/build.sh docker|enroot|apptainer [OUTPUT]
#   docker      the image megatron-video:VERSION on this machine
#   enroot      the same, then OUTPUT (megatron-video-VERSION.sqsh) of it, for pyxis
#   apptainer   OUTPUT (megatron-video-VERSION.sif), without docker
# BASE overrides NVIDIA's image, MAX_JOBS (8) the compilers at once. Needs the network, about 60 GB of disk and an hour.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
version=$(<"$root/megatron_video/VERSION")
image=megatron-video:$version
kind=${1:-}

usage() {
  sed -n '2,6p' "$0" >&2
  exit 2
}

need() {
  command -v "$1" >/dev/null || {
    echo "build.sh $kind: $1 is not installed here" >&2
    exit 2
  }
}

build_docker() {
  need docker
  local options=(--file "$root/slurm/container/Dockerfile" --tag "$image" --build-arg "MAX_JOBS=${MAX_JOBS:-8}")
  [ -z "${BASE:-}" ] || options+=(--build-arg "BASE=$BASE")
  DOCKER_BUILDKIT=1 docker build "${options[@]}" "$root"
}

case $kind in
  docker)
    build_docker
    echo "built $image; check it: slurm/container/check.sh $image"
    ;;
  enroot)
    need enroot
    output=${2:-megatron-video-$version.sqsh}
    build_docker
    enroot import --output "$output" "dockerd://$image"
    echo "built $output; in the profile: software.container=pyxis software.image=$(realpath "$output")"
    ;;
  apptainer)
    need apptainer
    output=$(realpath --no-symlinks "${2:-megatron-video-$version.sif}")
    cd "$root"
    apptainer build "$output" slurm/container/megatron-video.def
    echo "built $output; check it: slurm/container/check.sh $output"
    ;;
  *) usage ;;
esac
