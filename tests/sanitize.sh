#!/usr/bin/env bash
# Builds the extension with a sanitizer into build/sanitize-KIND and runs the tests of the ops under it:
#
#     tests/sanitize.sh address|undefined|thread [pytest arguments]
#
# PYTHON names the interpreter whose packages are used (.venv/bin/python), CXX the compiler (g++). No report is
# suppressed, neither ours nor others'.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:?address, undefined or thread}
shift
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
root=$PWD/build/sanitize-$kind

"$python" - "$root" <<'END'
import sys
from pathlib import Path

# An editable install would find its own extension first, in child processes as well.
site = Path(sys.argv[1], "site")
site.mkdir(parents=True, exist_ok=True)
(site / "sitecustomize.py").write_text(
    "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != 'ScikitBuildRedirectingFinder']\n"
)
END
cmake -S . -B "$root/cmake" -DPYPRUNE_CUDA=OFF -DPYPRUNE_SANITIZE="$kind" -DCMAKE_CXX_COMPILER="${CXX:-g++}" \
  -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$python" -c 'import pybind11; print(pybind11.get_cmake_dir())')" \
  -DCMAKE_INSTALL_PREFIX="$root/site" >"$root/configure.log"
cmake --build "$root/cmake" >"$root/build.log" || { tail -30 "$root/build.log" >&2; exit 1; }
rm -rf "$root/site/pyprune" && cp -r pyprune "$root/site/pyprune"
cmake --install "$root/cmake" >/dev/null

# The interpreter is not instrumented, so the sanitizer has to be there before it; libstdc++ too, for its throw.
library() { "${CXX:-g++}" -print-file-name="$1"; }
export PYTHONPATH=$root/site PYTHONSAFEPATH=1 PYTHONMALLOC=malloc OMP_NUM_THREADS=1 PYPRUNE_SANITIZED=$kind
# The interpreter keeps memory until it ends, so leaks are held by a test that counts, not by a list at the end.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
# A forked child may start threads of its own: the pool is made for that, and the sanitizer's doubts are its own locks.
export TSAN_OPTIONS=halt_on_error=1:die_after_fork=0:second_deadlock_stack=1
tests=(tests/ops)
prefix=()
case $kind in
  address) export LD_PRELOAD="$(library libasan.so) $(library libstdc++.so)" ;;
  thread)
    # torch's own threads are not instrumented and would all look like races: only tests without torch run.
    mapfile -t tests < <(grep -L -E '^ *(import|from) torch' tests/ops/test_*.py)
    export LD_PRELOAD="$(library libtsan.so) $(library libstdc++.so)"
    prefix=(setarch "$(uname -m)" -R) # ThreadSanitizer's memory map allows no randomised addresses
    ;;
esac
exec "${prefix[@]}" "$python" -m pytest -p no:cacheprovider "$@" "${tests[@]}"
