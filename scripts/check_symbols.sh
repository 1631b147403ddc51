#!/usr/bin/env bash
# What the binary holds and asks for: nothing that ties it to one torch version, one OpenMP, or one CPU.
# Usage: check_symbols.sh [a build directory; without one, build/plain is built]
set -euo pipefail
source "$(dirname "$0")/common.sh"
need nm binutils
dir=${1:-build/plain}
(($#)) || build "$dir" -DPYSEQ_CUDA=OFF
module=$(compgen -G "$dir/_C*.so") || fail "no _C in $dir"

# What is not inlined into a v4 object, say a function of the C++ library, is a weak symbol, which the linker may keep for
# every other CPU. One whose name holds the namespace v4 is safe: no object of another instruction set asks for it.
for objects in "$dir"/CMakeFiles/cpu_v*.dir; do
  isa=$(basename "$objects" .dir) isa=${isa#cpu_}
  mapfile -t files < <(find "$objects" -name '*.o')
  ((${#files[@]})) || fail "no objects in $objects"
  weak=$(nm -C --defined-only "${files[@]}" | grep -E ' [WVu] ' || true)
  shared=$(grep -v "pyseq::$isa::" <<<"$weak" || true)
  [[ -z $shared ]] || fail "weak symbols in $isa that other instruction sets could take:"$'\n'"$shared"
  say "$isa: ${#files[@]} objects, $(grep -c . <<<"$weak" || true) weak symbols in namespace $isa, 0 outside it"
done

undefined=$(nm -DC --undefined-only "$module" | sed 's/^ *[UwvV] //; s/@.*//')
shim=$(grep -cE '^(aoti_torch_|torch_)' <<<"$undefined" || true)
foreign=$(grep -E '\b(at|c10|caffe2|torch)::' <<<"$undefined" || true)
[[ -z $foreign ]] || fail "C++ symbols of torch, which change between its releases:"$'\n'"$foreign"
((shim > 0)) || fail "no symbol of torch's C shim is undefined: is this the extension module?"
say "torch: $shim symbols of its C shim, 0 of its C++ interface"

needed=$(readelf -d "$module" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p')
! grep -qiE 'gomp|iomp|libomp' <<<"$needed" || fail "an OpenMP runtime in NEEDED:"$'\n'"$needed"
! grep -q -- '-fopenmp' "$dir/compile_commands.json" || fail "-fopenmp in $dir/compile_commands.json"
say "needs: $(tr '\n' ' ' <<<"$needed")(no OpenMP runtime; no -fopenmp)"

# The C++ library's own templates are exported wherever they are instantiated; nothing of ours may be.
exported=$(nm -D --defined-only "$module" | awk '{print $NF}' | awk '!/^_ZZ?(T[ISV])?N?K?St/ || /pyseq|torch|pybind11/' |
  grep -vE '^(__bss_start|_edata|_end)$' || true)
[[ $exported == PyInit__C ]] || fail "exports more than PyInit__C:"$'\n'"$(c++filt <<<"$exported")"
say "exports: $exported, and instantiations of std's templates"
for family in GLIBC GLIBCXX CXXABI GCC; do
  newest=$(readelf -V "$module" | grep -oE "\b${family}_[0-9.]+" | sort -uV | tail -1 || true)
  say "newest $family: ${newest:-none}"
done
