#!/usr/bin/env bash
# The binary built here, with this Python's torch, loads in other torch releases and passes rms_norm_gated's tests there:
# numbers and gradients, opcheck, torch.compile, torch.export. Usage: check_torch_versions.sh [release...]
#
# PyPI's torch is a CUDA build that brings 2 to 3 GB of NVIDIA libraries. Without a GPU only the CUDA runtime is called
# (when libtorch_cuda registers its kernels), so that one is installed; the others are libraries of their names whose functions trap.
set -euo pipefail
source "$(dirname "$0")/common.sh"
need readelf binutils
releases=("$@")
((${#releases[@]})) || releases=(2.10.0 2.11.0 2.14.1)   # the oldest that pyproject.toml allows, and two others
here=$("$PYTHON" -c 'import torch; print(torch.__version__)')
site=$PWD/build/plain/site
build build/plain -DPYSEQ_CUDA=OFF

# The libraries that those in DIR need and that neither DIR nor the system nor site-packages/nvidia has.
missing_libraries() {
  for library in "$1"/*.so; do LD_LIBRARY_PATH=$1:$2 ldd "$library"; done | awk '/not found/ && !/version/ {print $1}' | sort -u
}

# stub DIR NAME: a library of that name with what those in DIR ask of it. Functions are bound when they are called, but
# their addresses, where taken, and the versions of symbols when a library is loaded; so all are there, and trap.
stub() {
  local version stem=${2#lib}
  version=$(readelf -VW "$1"/*.so | awk -v name="$2" '/File:/ {wanted = $5 == name} /Name:/ && wanted {print $3}' | sort -u)
  echo "${version:-unversioned} { global: *; };" >"$1/$2.version"
  nm -D --undefined-only "$1"/*.so | awk '{print $2}' |
    if [[ $version ]]; then sed -n "s/@$version\$//p"; else grep -v @ | grep -i "^${stem%%.so*}" || true; fi |
    sort -u | sed 's/.*/void &() { __builtin_trap(); }/' |
    "${CC:-gcc}" -w -shared -fPIC -Wl,-soname,"$2" ${version:+-Wl,--version-script="$1/$2.version"} -o "$1/$2" -x c -
}

for release in "${releases[@]}"; do
  venv=$PWD/build/torch/$release
  if [[ ! -e $venv/ready ]]; then
    "$PYTHON" -m venv --clear "$venv"
    pip=("$venv/bin/pip" install --quiet --quiet --disable-pip-version-check)
    "${pip[@]}" --no-deps "torch==$release"
    mapfile -t light < <("$venv/bin/python" - <<'PY'
import importlib.metadata as metadata
import re

for line in metadata.requires("torch"):
    requirement, _, marker = line.partition(";")
    name = re.match(r"[\w.-]+", requirement)[0]
    if name == "cuda-toolkit":
        print(re.sub(r"\[.*\]", "[cudart]", requirement).strip())
    elif "extra" not in marker and not re.match("nvidia(?!-cuda-runtime)|cuda|triton", name):
        print(requirement.strip())
PY
    )
    mapfile -t -O "${#light[@]}" light < <("$PYTHON" scripts/requirements.py; "$PYTHON" scripts/requirements.py test | grep -v transformers)
    "${pip[@]}" "${light[@]}" 2>"$venv/pip.log" || { cat "$venv/pip.log"; fail "pip failed"; }   # it misses the rest of NVIDIA's
    lib=$(echo "$venv"/lib/python*/site-packages/torch/lib)
    cuda=$(find "$lib/../../nvidia" -name 'libcudart.so*' -printf '%h' -quit 2>/dev/null || true)
    for name in $(missing_libraries "$lib" "$cuda"); do
      stub "$lib" "$name"
    done
    say "torch $release: the CUDA runtime, and libraries that only trap for the rest of NVIDIA's"
    touch "$venv/ready"
  fi
  # Separate from the tests: a library that traps would end them without a word. A function that is not there would show
  # only when it is called, so all are looked up.
  symbols=$(nm -D --undefined-only "$site"/pyseq/_C*.so | awk '$1 == "U" && $2 ~ /^(aoti_torch|torch)_/ {print $2}')
  loaded=$(cd "$site" && "$venv/bin/python" - $symbols <<'PY'
import ctypes
import pathlib
import sys

import torch

import pyseq

shim = ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
missing = [symbol for symbol in sys.argv[1:] if not hasattr(shim, symbol)]
assert sys.argv[1:] and not missing, f"this torch lacks {missing}"

x = torch.randn(3, 8, requires_grad=True)
pyseq.rms_norm_gated(x, torch.ones(8)).sum().backward()
print(f"torch {torch.__version__}, which has all {len(sys.argv) - 1} functions it asks for")
PY
  ) || fail "torch $release: pyseq does not import, or a stand-in for a library was called"
  # torch 2.14's fake tensors read the gradient of a tensor that is no leaf. torch hides its warning of that with a filter,
  # which does not hold where warnings are errors, as in these tests.
  result=$(PYTHON=$venv/bin/python tests "$site" "$ROOT/tests/ops" -k rms_norm_gated \
    -W "ignore:The .grad attribute of a Tensor that is not a leaf" | tee "$venv.log" | tail -1) ||
    { tail -40 "$venv.log"; fail "torch $release: $result"; }
  say "built with torch $here, run in $loaded: rms_norm_gated: $result"
done
