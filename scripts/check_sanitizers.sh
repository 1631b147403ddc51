#!/usr/bin/env bash
# The kernels under the address and undefined-behaviour sanitizers: numbers, strides, packing and pieces of every op on
# the backends cpu and, where the CUDA headers are, simt. g++ only; its sanitizers come with it.
# Usage: check_sanitizers.sh [instruction set for PYSEQ_CPU, the machine's widest without one]
set -euo pipefail
source "$(dirname "$0")/common.sh"
dir=build/sanitizers
simt=$(command -v nvcc >/dev/null && echo ON || echo OFF)
build "$dir" -DPYSEQ_CUDA=OFF -DPYSEQ_SIMT=$simt -DPYSEQ_SANITIZE=address,undefined -DCMAKE_CXX_COMPILER="${CXX:-g++}" \
  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-g1
say "built in ${SECONDS}s, simt $simt"

# Python itself is not instrumented, so the runtimes must be loaded before it; what it leaves to the system at exit is
# no leak. The emulator's fibers have stacks of their own, which the checks of use after return do not know.
for runtime in libasan.so libubsan.so; do
  runtime=$("${CXX:-g++}" -print-file-name=$runtime)
  preload=${preload:+$preload:}$(realpath "$runtime")
done
report=$PWD/$dir/report   # in files: pytest holds back what a process prints before it dies
rm -f "$report".*
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0:log_path=$report
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:log_path=$report
export PYSEQ_CPU=${1:-}
select='match_float64 or strides or packed or pieces or step or stride_zero or mix_freely'
(cd "$dir/site" && PYTHONPATH=$PWD LD_PRELOAD=$preload "$PYTHON" -m pytest "$ROOT/tests/ops" -x --durations=5 -k "$select") ||
  { cat "$report".* 2>/dev/null || true; fail "an error, see above"; }
say "no error found in ${SECONDS}s"
