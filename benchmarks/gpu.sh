#!/usr/bin/env bash
# What nobody could measure yet, on one GPU, in under eight minutes: the tests that need one, Linears, whole steps.
#
#     benchmarks/gpu.sh [FOLDER]        leaves tests.txt, gpu.md and gpu.json in FOLDER (default: gpu_results)
#
# What was compiled stays on disk (~/.triton, torch's own cache): a second run has time for what the first left out.
# Wants a CUDA build of torch, `pip install 'viditq[gpu,dev]'`, and for the rivals torchao and comfy-kitchen.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-gpu_results}
mkdir -p "$folder"
export PYTHONPATH=$PWD
python=${PYTHON:-python}
# some 250 kernels to compile, a second each: shared test by test, as one file has more than half of them
timeout 150 "$python" -m pytest -q -p no:cacheprovider --numprocesses 8 --dist load -m "not slow" tests/quant/execution/test_triton.py \
    tests/quant/execution/test_integer_backends.py tests/quant/execution/test_cuda.py \
    tests/quant/execution/test_float8_kernels.py tests/quant/execution/test_scaled_mm.py tests/test_gpu.py 2>&1 | tee "$folder/tests.txt"
tests=${PIPESTATUS[0]}
timeout 320 "$python" benchmarks/gpu.py --seconds 290 --out "$folder"
measured=$?
echo "tests ended with status $tests, the benchmark with $measured; what was found is in $folder"
exit $(( tests || measured ))
