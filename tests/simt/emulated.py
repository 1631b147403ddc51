"""Building the test kernels on the emulator, and calling them in every order of threads and blocks."""

import ctypes
import itertools
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
ORDERS = list(itertools.product((0, 1, 2), repeat=2))  # schedule of threads x order of blocks
LAUNCH_FAILURE = 719  # a cudaError_t


def find_cuda_include() -> Path | None:
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).resolve().parents[1]]
    includes = [Path(home) / "include" for home in homes if home]
    return next((i for i in includes if (i / "cuda_runtime_api.h").exists()), None)


CUDA = find_cuda_include()
CXX = shutil.which("g++")
DESCRIPTORS = ["-mtls-dialect=gnu2"] if platform.machine() == "x86_64" else []  # as _simt has it
needs_toolkit = pytest.mark.skipif(not (CUDA and CXX), reason="needs the CUDA toolkit's headers and g++")


def compile_cpp(source: Path, output: Path, *flags: str | Path) -> Path:
    common = ["-std=c++20", "-g", "-fvisibility=hidden", "-fno-strict-aliasing", "-I", CSRC, "-isystem", CUDA]
    # nvcc compares threadIdx with int silently, too, and knows `#pragma unroll`.
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-sign-compare", "-Wno-unknown-pragmas"]
    subprocess.run([CXX, *common, *warnings, *flags, source, "-o", output], check=True)
    return output


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.last_error.restype = ctypes.c_char_p
    library.launches.restype = ctypes.c_int64
    return library


def run(lib, order, name, *args) -> int:
    """Calls one C function: tensors go as addresses, floats as floats, the rest as ints."""
    kept = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in args]
    lib.set_order(*order)
    convert = {torch.Tensor: lambda a: ctypes.c_void_p(a.data_ptr()), float: ctypes.c_float, int: ctypes.c_int}
    return getattr(lib, name)(*(convert[type(a)](a) for a in kept))


def nan(*shape) -> torch.Tensor:
    return torch.full(shape, torch.nan)


def in_every_order(lib, name, make_args, out) -> torch.Tensor:
    """The output, after checking that it has the same bits in all orders."""
    results = []
    for order in ORDERS:
        args = make_args()
        assert run(lib, order, name, *args) == 0, lib.last_error()
        results.append(args[out])
    for r in results[1:]:
        assert torch.equal(r.view(torch.uint8), results[0].view(torch.uint8))
    return results[0]


def results(lib, name, make_args, out) -> list[torch.Tensor]:
    outputs = []
    for order in ORDERS:
        args = make_args()
        assert run(lib, order, name, *args) == 0, lib.last_error()
        outputs.append(args[out])
    return outputs


def fails(lib, name, *args) -> set[str]:
    messages = set()
    for order in ORDERS:
        assert run(lib, order, name, *args) == LAUNCH_FAILURE
        messages.add(lib.last_error().decode())
    return messages
