#!/usr/bin/env bash
# Builds _C with the oldest g++ and the two clangs around version 17 that Debian 12 carries (it has no clang 17), without
# a warning, and runs one op's tests on each. Usage: check_compilers.sh [C++ compiler...]
set -euo pipefail
source "$(dirname "$0")/common.sh"
compilers=("$@")
((${#compilers[@]})) || compilers=(g++-11 clang++-16 clang++-19)

for compiler in "${compilers[@]}"; do
  package=${compiler/clang++/clang}   # Debian's package of clang++-16 is clang-16
  need "$compiler" "$package"
  dir=build/compilers/$compiler
  build "$dir" -DPYSEQ_CUDA=OFF -DCMAKE_CXX_COMPILER="$compiler"
  ! grep 'warning:' "$dir.log" || fail "$compiler warns: see $dir.log"
  built=$(cd "$dir/site" && "$PYTHON" -c 'import pyseq._C as c; print(f"_C by {c.compiler}, level v{c.cpu_level}")')
  result=$(tests "$dir/site" "$ROOT/tests/ops/test_rms_norm_gated.py" | tail -1) || fail "$compiler: $result"
  say "$("$compiler" --version | head -1): $built; rms_norm_gated: $result"
done
