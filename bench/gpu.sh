#!/usr/bin/env bash
# Everything that wants an NVIDIA GPU, in one run:  bench/gpu.sh FOLDER
#
# Builds the native module with its CUDA kernels, runs the tests marked gpu, the CUDA kernels under compute-sanitizer
# (memcheck and racecheck), the kernel benchmarks, and the decoder's if the zoo's target is in the cache. FOLDER gets a log of
# each step, the benchmarks' JSON, a table of the kernels' and summary.txt. A step that fails does not stop the others, but
# fails the run. PYTHON names another interpreter; the build needs pybind11, cmake, ninja and nvcc, and no network.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=$(mkdir -p "${1:?usage: bench/gpu.sh FOLDER}" && cd "$1" && pwd)
python=${PYTHON:-python3}
failed=0
: >"$out/summary.txt"

step() { # name command...
  local name=$1
  shift
  echo "== $name: $*"
  if "$@" >"$out/$name.log" 2>&1; then
    echo "$name: ok" | tee -a "$out/summary.txt"
  else
    echo "$name: FAILED, see $name.log" | tee -a "$out/summary.txt"
    tail -n 30 "$out/$name.log"
    failed=1
  fi
}

sanitizer() { # tool
  # The checks slow kernels down a hundred times: the small cases, which reach every branch, are enough. Only our kernels:
  # torch's are not ours to judge.
  compute-sanitizer --tool "$1" --error-exitcode 9 --kernel-regex kns=hedgespec \
    "$python" -m pytest -q -x -m gpu -k "cuda and not many_rows and not scores_are and not always_accepted" \
    tests/test_evaluate.py tests/test_verify.py
}

export HEDGESPEC_CUDA=1
step build "$python" -m pip install --no-build-isolation --no-deps -e .
step doctor "$python" -m hedgespec doctor
step tests "$python" -m pytest -q -m gpu
step memcheck sanitizer memcheck
step racecheck sanitizer racecheck
for operation in evaluate verify head_layers stack; do
  step "bench_$operation" "$python" -m pytest -q -s "bench/bench_$operation.py" --device cuda \
    --benchmark-json "$out/$operation.json"
done
"$python" bench/table.py "$out"/{evaluate,verify,head_layers,stack}.json >"$out/table.md"
# Making the zoo's target wants a network: the decoder is measured where it was made before.
if "$python" -c 'from hedgespec.utils.paths import cache_dir; from hedgespec.zoo import target; exit(not (cache_dir() / target.NAME / "COMPLETE").exists())'; then
  step bench_round "$python" bench/bench_round.py --device cuda --json "$out/round.json"
  step bench_target "$python" bench/bench_target.py --device cuda --dtype bfloat16 --json "$out/target.json"
  step bench_decoder "$python" bench/bench_decoder.py --device cuda --json "$out/decoder.json"
  step bench_tree "$python" bench/bench_options.py --option tree --values chain 2 4,2,1,1,1 4/8 8/16 8/32 --device cuda \
    --json "$out/tree.json"
  step bench_objective "$python" bench/bench_options.py --option objective --values tokens throughput --plain --warm-up 96 \
    --device cuda --json "$out/objective.json"
else
  echo "bench_round, bench_target, bench_decoder, bench_tree, bench_objective: left out, the zoo's target is not in the cache" | tee -a "$out/summary.txt"
fi
{
  date -u +%F
  git rev-parse HEAD
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
  "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
} >>"$out/summary.txt" 2>&1
cat "$out/summary.txt"
exit "$failed"
