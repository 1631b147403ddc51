"""An op is whole or it does not pass: every tree holds a file of its name, and the kernels it declares exist."""

import re
from pathlib import Path

import pytest

from pyseq import _C, reference
from pyseq._library import REGISTRY

ROOT = Path(__file__).parent.parent
OPS = list(REGISTRY.values())
by_name = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


@by_name
def test_an_op_has_its_files(op):
    name = op.name
    kinds = [k for k in op.kinds]
    files = [f"csrc/{name}/kernel.h", f"csrc/{name}/binding.cpp", *(f"csrc/{name}/{k}_cpu.cpp" for k in kinds)]
    if name in _C.cuda_ops:
        files += [f"csrc/{name}/{k}_cuda.cu" for k in kinds]
    files += [f"pyseq/ops/{name}.py", f"pyseq/reference/{name}.py", f"pyseq/samples/{name}.py"]
    files += [f"tests/ops/test_{name}.py", f"benchmarks/bench_{name}.py", f"docs/ops/{name}.md"]
    assert [f for f in files if not (ROOT / f).is_file()] == []


@by_name
def test_an_op_has_kernels_and_a_reference(op):
    assert "cpu" in op.backends
    assert {"forward", "backward"} <= set(op.kinds) or (op.kinds == ("step",) and op.updates and op.step is None)
    assert callable(getattr(reference, op.name))
    assert op.step is None or callable(getattr(reference, op.step.__name__))


def test_every_folder_of_kernels_is_in_the_registry():
    folders = {p.parent.name for p in ROOT.glob("csrc/*/kernel.h")}
    assert folders == set(REGISTRY) == set(_C.cpu_ops)


MAY_INCLUDE = {
    "*_cpu.cpp": r'"(cpu/|view\.h|\{op\}/)',
    "*_cuda.cu": r'"(cuda/|view\.h|\{op\}/)',
    "binding.cpp": r'"(cpu/(dispatch|reduce)\.h|torch_api/|registry\.h|view\.h|\{op\}/)',
}


@pytest.mark.parametrize("pattern", MAY_INCLUDE)
def test_the_folder_says_what_may_be_included(pattern):
    wrong = []
    for path in ROOT.glob(f"csrc/*/{pattern}"):
        allowed = MAY_INCLUDE[pattern].replace(r"\{op\}", path.parent.name)
        for line in re.findall(r'#include (".*")', path.read_text()):
            if not re.match(allowed, line):
                wrong.append(f"{path.relative_to(ROOT)}: {line}")
    assert wrong == []


def test_pybind11_stays_in_the_two_modules():
    users = {str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*") if p.is_file() and "pybind11" in p.read_text()}
    assert users <= {"csrc/module.cpp", "csrc/simt/module.cpp"}
