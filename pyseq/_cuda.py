"""What the CUDA kernels were compiled for, and which of the GPUs here run them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from . import _C


@dataclass(frozen=True)
class Architecture:
    """One entry of CMake's list: "90a-real" is machine code for sm_90a, "120" machine code and PTX."""

    number: int     # 10 major + minor
    letter: str     # "a", "f": that one card only
    code: bool      # machine code, which runs on later minors of the same major
    ptx: bool       # PTX, which the driver compiles for any later card

    def __str__(self) -> str:
        return f"{self.number}{self.letter}"


def architectures(compiled: str | None) -> tuple[Architecture, ...]:
    """
    >>> [str(a) for a in architectures("80,90a-real")]
    ['80', '90a']
    """
    found = re.findall(r"(\d+)([af]?)(-real|-virtual|)", compiled or "")
    return tuple(Architecture(int(n), letter, kind != "-virtual", kind != "-real") for n, letter, kind in found)


def summary(compiled: str | None) -> str:
    """What was compiled, in words."""
    if not compiled:
        return "no kernels: built without nvcc"
    known = architectures(compiled)
    code, ptx = ([f"{kind}_{a}" for a in known if have(a)] for kind, have in _KINDS)
    return f"kernels for {', '.join(code)}" + (f"; PTX of {', '.join(ptx)}" if ptx else "")


_KINDS = (("sm", lambda a: a.code), ("compute", lambda a: a.ptx))


def runs_on(capability: tuple[int, int], compiled: str | None) -> str | None:
    """How a card of this compute capability gets its kernels, or None if it gets none."""
    major, minor = capability
    card = 10 * major + minor
    known = architectures(compiled)
    code = [
        a for a in known
        if a.code and (a.number == card if a.letter else a.number // 10 == major and a.number <= card)
    ]
    if code:
        return f"runs the machine code of sm_{max(code, key=lambda a: (a.number, a.letter))}"
    ptx = [a for a in known if a.ptx and (a.number == card if a.letter else a.number <= card)]
    if ptx:
        return f"compiles the PTX of compute_{max(ptx, key=lambda a: a.number)} when a kernel first runs"
    return None


def version(number: int) -> str:
    """13000 -> "13.0" """
    return f"{number // 1000}.{number % 1000 // 10}"


def absence() -> str | None:
    """Why nothing runs on a GPU here, in one sentence; None if something does."""
    if torch.version.cuda is None:
        return "this torch is a CPU build: a CUDA build of torch is needed to use a GPU"
    driver = _C.cuda_driver_version()
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA driver" if driver == 0 and _C.cuda_architectures else "torch sees no GPU"
    if not _C.cuda_architectures:
        return "pyseq was built without CUDA kernels (no nvcc was found): build it from source where nvcc is"
    if driver < _C.cuda_runtime_version // 1000 * 1000:
        return (
            f"the driver supports CUDA {version(driver)}, and the kernels were built with "
            f"{version(_C.cuda_runtime_version)}: update the driver, or build pyseq with an older nvcc"
        )
    if not _with_kernels():
        return "no kernels were compiled for this card: build pyseq from source here"
    return None


def _with_kernels() -> list[int]:
    """The numbers of the GPUs that torch sees and kernels run on."""
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return [i for i, capability in enumerate(capabilities) if runs_on(capability, _C.cuda_architectures)]


def cards() -> list[dict[str, Any]]:
    """The GPUs that torch sees."""
    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        how = runs_on((card.major, card.minor), _C.cuda_architectures)
        found.append({
            "device": f"cuda:{i}",
            "name": card.name,
            "architecture": f"sm_{card.major}{card.minor}",
            "memory_gib": round(card.total_memory / 2**30, 1),
            "kernels": how or "has no kernels in this build: build pyseq from source here",
        })  # fmt: skip
    return found


def usable_device(name: str | None) -> str:
    """`name` if it can be computed on here; None: the first GPU that kernels run on, else the CPU.

    Raises:
        ValueError: no such device, and why.
    """
    if name is None:
        return "cpu" if absence() else f"cuda:{_with_kernels()[0]}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r}: expected cpu, cuda or cuda:<number>") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r}: expected cpu, cuda or cuda:<number>")
    if device.type == "cuda":
        why = absence()
        if why is None:
            index = torch.cuda.current_device() if device.index is None else device.index
            if index >= torch.cuda.device_count():
                why = f"there are {torch.cuda.device_count()} GPUs here, counted from 0"
            elif index not in _with_kernels():
                why = "no kernels were compiled for this card: build pyseq from source here"
        if why:
            raise ValueError(f"device {name!r}: {why}")
    return name
