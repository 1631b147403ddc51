"""cpu/simd.h on every instruction set of this machine: its functions against libm, its 16-bit dtypes bit by bit."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from pyseq import _C

HERE = Path(__file__).parent
CXX = shutil.which(os.environ.get("CXX", "g++"))
X86 = platform.machine() in ("x86_64", "AMD64")
ISAS = [f"v{level}" for level in range(2, _C.cpu_level_of_machine + 1)]
# As in CMakeLists.txt; g++ 12 takes the undefined operands inside its own AVX-512 headers for uninitialised variables.
FLAGS = ["-std=c++20", "-O2", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wno-psabi"]


@pytest.mark.skipif(not CXX, reason="needs a C++ compiler")
@pytest.mark.parametrize("isa", ISAS)
def test_functions_and_dtypes(tmp_path, isa):
    program = tmp_path / "simd_test"
    flags = [*FLAGS, *([f"-march=x86-64-{isa}"] if X86 else [])]
    subprocess.run([CXX, *flags, "-I", HERE.parents[1] / "csrc", HERE / "simd_test.cpp", "-o", program], check=True)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
