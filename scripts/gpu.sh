#!/usr/bin/env bash
# One part of `make gpu`: builds pyseq for the GPU of this machine from what is installed, and runs the part on it.
# Nothing is downloaded. It writes build/gpu, benchmarks/results/<card>/<part>.json and docs/performance.md.
# Usage: gpu.sh check|bench|profile     with PYTHON one that has torch >= 2.10 and sees the GPU (python3 without it)
#        gpu.sh dry-run                  without a GPU: the offline build, and all three parts on the emulator
set -euo pipefail
PYTHON=$(command -v "${PYTHON:-python3}") || { echo "make gpu: there is no ${PYTHON:-python3}" >&2; exit 1; }
source "$(dirname "$0")/common.sh"
part=${1:?which part: check, bench, profile or dry-run}
readonly LIMIT=475   # seconds of one part, the build among them: 8 minutes less a little

# build_offline DIR [cmake option...]: an importable pyseq in DIR/site, through pip and scikit-build-core where this
# Python has them, else through cmake alone; pybind11's headers come with torch where it is not installed.
build_offline() {
  local dir=$1 defines=(); shift
  export JOBS=${JOBS:-$(nproc)}
  if "$PYTHON" -c 'import pip, scikit_build_core' 2>/dev/null; then
    for option in "$@"; do defines+=("-Ccmake.define.${option#-D}"); done
    mkdir -p "$dir"
    "$PYTHON" -m pip install --quiet --no-index --no-build-isolation --no-deps --upgrade --root-user-action=ignore \
      --disable-pip-version-check --target "$dir/site" "-Cbuild-dir=$dir/cmake" "${defines[@]}" . >"$dir.log" 2>&1 ||
      { tail -40 "$dir.log"; fail "the build in $dir failed"; }
    standalone "$dir/site"
  else
    build "$dir" "-DPython_EXECUTABLE=$PYTHON" "$@"
  fi
}

# on SITE MODULE argument...: runs a module of benchmarks.gpu on the pyseq in SITE.
on() {
  local site=$1 module=$2; shift 2
  (cd "$site" && PYTHONPATH=$PWD:$ROOT PYTHONDONTWRITEBYTECODE=1 "$PYTHON" -m "benchmarks.gpu.$module" "$@")
}

if [[ $part != dry-run ]]; then
  architecture=$("$PYTHON" -m benchmarks.gpu.machine) || exit 1
  build_offline build/gpu "-DCMAKE_CUDA_ARCHITECTURES=$architecture"
  say "built for $architecture in ${SECONDS}s"
  status=0
  on build/gpu/site "$part" --seconds $((LIMIT - SECONDS)) || status=$?
  "$PYTHON" -m benchmarks.gpu.report
  exit $status
fi

# Without a GPU `make gpu` says so in one sentence; on a machine that has one, this is not asked.
if message=$("$PYTHON" -m benchmarks.gpu.machine 2>&1); then say "there is a GPU for $message: \`make gpu\` runs on it"
else say "$message"; fi

# The build as a machine without pybind11 and scikit-build-core sees it; the CUDA kernels were compiled by `make install`.
# The folder is that of check_symbols.sh, which then has nothing left to compile.
hidden=$ROOT/build/gpu-dry-hidden
mkdir -p "$hidden"
for module in pybind11 scikit_build_core; do echo "raise ImportError('hidden')" >"$hidden/$module.py"; done
(export PYTHONPATH=$hidden; build_offline build/plain -DPYSEQ_CUDA=OFF -DCMAKE_DISABLE_FIND_PACKAGE_pybind11=ON)
grep -q 'pybind11 is not installed: using the headers in' build/plain.log || fail "the build found the hidden pybind11"
(cd build/plain/site && PYTHONPATH=$PWD "$PYTHON" -c '
import pyseq, torch
y = pyseq.rms_norm_gated(torch.ones(2, 8), torch.ones(8))
assert pyseq.__file__.endswith("build/plain/site/pyseq/__init__.py") and y.allclose(torch.ones(2, 8))')
say "built without pybind11 and scikit-build-core in ${SECONDS}s; it imports and computes"

results=$(mktemp -d) site=$results/no-build   # the pyseq that `make install` installed, emulator included
trap 'rm -rf "$results"' EXIT
mkdir -p "$site" "$results/docs"
for name in check bench profile; do on "$site" "$name" --dry-run --results "$results"; done
on "$site" report "$results" "$results/docs"
grep -q '^## GPU: emulator' "$results/docs/performance.md" || fail "the page lacks the section of the card"
say "every step that needs no GPU ran, in ${SECONDS}s"
