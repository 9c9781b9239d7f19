#!/usr/bin/env bash
# Inside the image, as it is built, by docker and apptainer alike:    install.sh dependencies|package
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source_folder=/opt/megatron-video
constraints=/opt/container/constraints.txt

# NVIDIA's image holds every package at its own version through this variable; here only torch and what belongs to it
# stay, since all else of the image was built against them.
unset PIP_CONSTRAINT
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1

install_dependencies() {
  mkdir -p "$(dirname "$constraints")"
  python - >"$constraints" <<'PYTHON'
import importlib.metadata

for name in ("torch", "torchvision", "triton"):
    try:
        print(f"{name}=={importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        pass
PYTHON
  # Two builds of OpenCV overwrite each other's files.
  pip uninstall --yes opencv opencv-python opencv-contrib-python
  # Transformer Engine's extension is compiled here, against the image's torch: for Hopper and Blackwell.
  export NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS=${NVTE_CUDA_ARCHS:-"90;100"}
  pip install --no-build-isolation --constraint "$constraints" --requirement "$here/requirements.txt"
  # Of the image itself: the name `apex` on PyPI is another project.
  python -c "import apex.optimizers" || {
    echo "install.sh: the base image has no apex; take one that has, or install NVIDIA/apex from source" >&2
    exit 1
  }
}

install_package() {
  pip install --no-build-isolation --no-deps "$source_folder"
  # Whatever the package asks for must be there, at a version it allows.
  pip check || echo "install.sh: pip check complains of packages of the base image; see above" >&2
  python "$source_folder/slurm/container/check_versions.py" "$here/requirements.txt"
}

case ${1:-} in
  dependencies) install_dependencies ;;
  package) install_package ;;
  *)
    sed -n '2p' "$0" >&2
    exit 2
    ;;
esac
