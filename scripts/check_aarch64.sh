#!/usr/bin/env bash
# A machine that is not x86-64 gets one build at its natural width: cross-compiles every CPU kernel for aarch64 without a
# warning, then runs cpu/simd.h's own test under an emulator of that machine.
set -euo pipefail
source "$(dirname "$0")/common.sh"
cross=aarch64-linux-gnu-g++
need $cross g++-aarch64-linux-gnu
need qemu-aarch64 qemu-user
dir=build/aarch64
mkdir -p "$dir" && rm -f "$dir"/*.o
flags=(-std=c++20 -O3 -fPIC -fno-math-errno -fno-trapping-math -ffp-contract=off -Wall -Wextra -Werror -Wno-psabi -Icsrc)

sources=(csrc/cpu/dispatch.cpp csrc/*/*_cpu.cpp)
printf '%s\n' "${sources[@]}" | xargs -P "${JOBS:-2}" -I{} bash -c '
  source=$1; shift
  "$@" -c "$source" -o "'"$dir"'/$(tr / _ <<<"${source%.cpp}").o"' _ {} $cross "${flags[@]}" -DPYSEQ_ISA=v2
kernels=$(nm -C --defined-only "$dir"/*.o | grep -c ' T pyseq::v2::')
say "$($cross --version | head -1): ${#sources[@]} files compiled, $kernels kernels in namespace v2"

$cross "${flags[@]}" -static tests/build/simd_test.cpp -o "$dir/simd_test"
qemu-aarch64 "$dir/simd_test" | sed 's/^/  /' || fail "cpu/simd.h is wrong on aarch64"
say "$(qemu-aarch64 --version | head -1): cpu/simd.h's test passes"
