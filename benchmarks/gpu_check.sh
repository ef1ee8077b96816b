#!/usr/bin/env bash
# Build with CUDA, run the GPU tests, check memory and races, and time every kernel beside its peers; a short table last.
#
#   bash benchmarks/gpu_check.sh [FOLDER]     results go to FOLDER, else $OUT, else build/gpu
#
# Needs Python with torch for CUDA, nvcc, cmake, pybind11, scikit-build-core and pytest; uses compute-sanitizer and
# CuPy where they are. Each step runs whatever the one before it said; the last line names those that failed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-${OUT:-build/gpu}}")
python=${PYTHON:-python3}
site=$(realpath -m build/gpu_site)
mkdir -p "$out"
failed=()

step() { # NAME SECONDS COMMAND...: run it with a limit, keep what it says
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  local began=$SECONDS
  if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
    echo "   done in $((SECONDS - began)) s: $(tail -n 1 "$out/$name.log" | cut -c1-160)"
  else
    failed+=("$name")
    echo "   FAILED (status $?) after $((SECONDS - began)) s; the end of $out/$name.log:"
    tail -n 25 "$out/$name.log"
  fi
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
step build 420 "$python" -m pip install -q --no-build-isolation --no-deps --upgrade --target "$site" \
  -C cmake.define.PYPRUNE_CUDA=ON -C cmake.define.CMAKE_CUDA_ARCHITECTURES=native .
export PYTHONPATH="$site" PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1
step doctor 60 "$python" -m pyprune doctor
step tests 300 "$python" -m pytest -q -p no:cacheprovider -o addopts="" -m gpu --durations=5 tests
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step "$tool" 150 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" benchmarks/gpu_small.py
  done
else
  echo "== memcheck, racecheck: no compute-sanitizer here"
fi
step bench 240 "$python" -m pyprune bench --device cuda --out "$out/bench.json"
step ksearch 200 "$python" benchmarks/test_bench_kmeans.py cuda
cat "$out/doctor.log" "$out/bench.log" "$out/ksearch.log"
echo "failed: ${failed[*]:-nothing}"
[ ${#failed[@]} -eq 0 ]
