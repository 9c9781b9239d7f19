#!/usr/bin/env bash
# The GPU tests on a machine that has torch, but neither this project's other packages nor a network.
#
#   bash tests/gpu/run_on_gpu.sh pack [FOLDER OF TRANSFORMER ENGINE'S WHEELS]   here: collect wheels in .whl (ignored by git)
#   bash tests/gpu/run_on_gpu.sh [PYTEST ARGUMENTS]                             there: install them, test, print a table
#
# `pack` takes what needs no download from the folder (default ../shared/gpu/wheels). The whole log of a run is in
# $OUT/gpu_tests.log, the planner's memory beside what was measured in $OUT/measured_memory.md ($OUT: default runs/gpu).
set -euo pipefail
cd "$(dirname "$0")/../.."
WHEELS=.whl
SITE=${SITE:-/tmp/site}

pack() {
    mkdir -p "$WHEELS"
    cp "${1:-../shared/gpu/wheels}"/*.whl "$WHEELS"
    # Pure Python, or small; the rest is on the machine (KINDS of the device tool, GPU.md).
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -d "$WHEELS" webdataset braceexpand
    du -sh "$WHEELS"
}

install() {
    # One command for all of Transformer Engine's wheels: they share a folder.
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "$WHEELS"/*.whl
    export PYTHONPATH=$SITE:$PWD:$PWD/tests
}

find_libraries() {
    local packages links
    packages=$(python3 -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    links=$(mktemp -d)
    # Transformer Engine opens libcuda.so, of which the driver may bring only libcuda.so.1.
    ldconfig -p | grep -q 'libcuda.so ' ||
        ln -sf "$(ldconfig -p | awk '/libcuda.so.1/{print $NF; exit}')" "$links/libcuda.so"
    LD_LIBRARY_PATH=$(printf '%s:' "$packages"/nvidia/*/lib)$links:${LD_LIBRARY_PATH:-}
    export LD_LIBRARY_PATH NVTE_CUDA_INCLUDE_DIR=${NVTE_CUDA_INCLUDE_DIR:-/usr/local/cuda/include}
    export CUDA_DEVICE_MAX_CONNECTIONS=1 PYTHONUNBUFFERED=1
}

show_versions() {
    python3 - <<'PYTHON'
import torch
import megatron.core

try:
    import transformer_engine.pytorch
    engine = transformer_engine.__version__
except ImportError as error:
    engine = f"cannot be imported: {error}"
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN "
      f"{torch.backends.cudnn.version()}, megatron-core {megatron.core.__version__}, Transformer Engine {engine}")
PYTHON
}

# PASSED, FAILED and SKIPPED by file and test function, from pytest's own lines.
show_table() {
    awk '/^tests\/gpu\/.*(PASSED|FAILED|ERROR|SKIPPED)/ {
            split($1, part, /::|\[/); name = part[1] "::" part[2]
            if (!(name in seen)) { order[++count] = name; seen[name] = 1 }
            for (field = 2; field <= NF; field++) if ($field ~ /^(PASSED|FAILED|ERROR|SKIPPED)$/) result[name, $field]++
        }
        END {
            printf "%-92s %6s %6s %7s\n", "", "passed", "failed", "skipped"
            for (i = 1; i <= count; i++) {
                name = order[i]; failed = result[name, "FAILED"] + result[name, "ERROR"]
                printf "%-92s %6d %6d %7d\n", name, result[name, "PASSED"], failed, result[name, "SKIPPED"]
            }
        }' "$1"
    grep -E '^E   +[A-Za-z]*(Error|assert)' "$1" | sort | uniq -c | sort -rn | head -20 || true
    tail -n 1 "$1"
}

if [[ ${1:-} == pack ]]; then
    pack "${@:2}"
    exit
fi
OUT=${OUT:-runs/gpu}
mkdir -p "$OUT"
LOG=$OUT/gpu_tests.log
install
find_libraries
show_versions 2>&1 | tee "$LOG"
status=0
python3 -m pytest -m gpu tests/gpu -v --tb=short --durations=15 -p no:cacheprovider "$@" >>"$LOG" 2>&1 || status=$?
show_table "$LOG"
# The planner's memory beside the allocator's, for as many layouts as the GPUs allow. Shards need pyarrow, whose wheel is
# too large to come along.
if python3 -c 'import pyarrow' 2>/dev/null; then
    python3 -m training.planner.measure_memory --device cuda --out "$OUT/measured_memory.md" 2>>"$LOG" || status=$?
else
    echo 'no pyarrow on this machine: memory was not measured'
fi
exit "$status"
