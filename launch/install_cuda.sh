#!/usr/bin/env bash
# A GPU machine, from nothing: NVIDIA driver 580 or newer, CUDA toolkit 13 (nvcc), Linux x86_64.
#
#   bash launch/install_cuda.sh [--apex]        into .venv; APEX_SOURCE: a git URL or directory of NVIDIA's apex, APEX_REF: what of it
#
# The order matters. Transformer Engine's part for torch comes as source and is built here: against the torch that vLLM pins,
# which must be there first, and without build isolation, which would build it against whatever torch is newest. apex likewise;
# it is optional (fused gradient accumulation). Started again it installs nothing twice; what was built for another torch it
# builds anew.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
APEX_SOURCE=${APEX_SOURCE:-https://github.com/NVIDIA/apex} APEX_REF=${APEX_REF:-25.09}
case "${1:-}" in
'') apex= ;;
--apex) apex=1 ;;
*) fail "usage: bash launch/install_cuda.sh [--apex]" ;;
esac

command -v nvcc >/dev/null || fail "no nvcc: install CUDA toolkit 13 and put its bin directory on PATH"
nvcc --version | grep -q 'release 13' || fail "$(nvcc --version | grep release): torch and vLLM are built for CUDA 13"
if command -v nvidia-smi >/dev/null; then
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader --id=0)
    [ "${driver%%.*}" -ge 580 ] || fail "driver $driver: CUDA 13 wants 580 or newer"
fi
pin() { grep "^$1==" requirements/cuda.txt; }
install() { pip install -c .venv/constraints.txt "$@"; }

[ -n "${R1MEGA_PYTHON:-}" ] || base=$(find_python 3.12) # megatron-core's current release; 3.11 gets the last one for it
make_venv .venv "${base:-}"
# What a CPU has too in the versions that the tests run; but for some, of which vLLM and the toolkit for CUDA want their own.
grep -Ev '^(apache-tvm-ffi|nvidia-cuda-cuobjdump|nvidia-cuda-nvdisasm)==' requirements/cpu.lock >.venv/constraints.txt
say "torch, vLLM and Transformer Engine's compiled core"
install "$(pin torch)"
install -r requirements/cuda.txt
say "Transformer Engine's part for torch, built here (minutes)"
install setuptools wheel ninja cmake packaging pybind11 nvidia-mathdx
# cuDNN's and NCCL's headers came with torch. No cache: pip keeps what it built once, whatever torch it was for.
headers=$(printf '%s:' "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"/nvidia/*/include)
build() { CPATH=${headers%:}${CPATH:+:$CPATH} MAX_JOBS=${MAX_JOBS:-8} install --no-build-isolation --no-cache-dir "$@"; }
export NVTE_FRAMEWORK=pytorch
engine=$(pin transformer-engine | sed 's/^transformer-engine/transformer-engine-torch/')
build "$engine"
case $("$PYTHON" -c 'import transformer_engine.pytorch' 2>&1 || true) in
*'undefined symbol'*) build --force-reinstall --no-deps "$engine" ;; # it was here before, for another torch
esac
if [ -n "$apex" ] && ! "$PYTHON" -c 'import torch, amp_C, fused_weight_gradient_mlp_cuda' 2>/dev/null; then
    say "apex (minutes)"
    source=$APEX_SOURCE
    [ -d "$source" ] || { source=$(mktemp -d) && git clone --depth 1 --branch "$APEX_REF" "$APEX_SOURCE" "$source"; }
    APEX_CPP_EXT=1 APEX_CUDA_EXT=1 build "$source"
fi
say "r1mega and its kernels"
install -c requirements/cuda.txt -e '.[cuda]'
"$PYTHON" kernels/build.py --cuda
exec r1mega doctor
