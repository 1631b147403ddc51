"""explain(): which kernel a call runs, and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import _C, _cuda, _library
from ._library import REGISTRY, Op


@dataclass(frozen=True)
class Explanation:
    """What a call would run: `kernel` is "cpu v4", "cuda", "simt", "torch" or "reference"; `notes` tell what else."""

    op: str
    kernel: str
    why: str
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"pyseq.{self.op}: {self.kernel} ({self.why})", *(f"  {note}" for note in self.notes)]
        return "\n".join(lines)


def explain(op: Callable, *args: Any, **kwargs: Any) -> Explanation:
    """Tells which kernel `op(*args, **kwargs)` runs and why, and which arguments are copied first. Runs nothing.

    Args:
        op: a public op or step, e.g. `pyseq.rms_norm_gated`.

    Raises:
        TypeError: `op` is not an op of pyseq, or the arguments do not fit its signature.
    """
    entry = next((e for e in REGISTRY.values() if op is not None and op in (e.function, e.step)), None)
    if entry is None:
        known = ", ".join(e.function.__name__ for e in REGISTRY.values())
        raise TypeError(f"explain: op is {op!r}, expected one of pyseq's ops: {known}")
    bound = inspect.signature(op).bind(*args, **kwargs).arguments
    tensors = {name: value for name, value in bound.items() if isinstance(value, torch.Tensor)}
    kernel, why = _kernel(entry, tensors)
    own = entry.notes if kernel != "reference" else None
    notes = own(bound) if own is not None else _notes(entry, tensors, kernel)
    return Explanation(op.__name__, kernel, why, tuple(notes))


def _kernel(op: Op, tensors: dict[str, torch.Tensor]) -> tuple[str, str]:
    double = [n for n, t in tensors.items() if t.dtype == torch.float64 and n not in (*op.float32, "state")]
    if double:
        return "reference", f"{double[0]} is float64, and only the reference computes in float64"
    device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
    if device.type == "cuda":
        if "cuda" in op.backends:
            return "cuda", f"the tensors are on {device}; {_cuda.summary(_C.cuda_architectures)}"
        if op.cublas:
            return "torch", f"the tensors are on {device}: cuBLAS"
        return "none", f"the tensors are on {device}, and this build has no CUDA kernel for the op: the call raises"
    if _library._namespace == "pyseq_simt":
        return "simt", "the CUDA kernel, run on the CPU by the emulator"
    if _C.cpu_level < _C.cpu_level_of_machine:
        return f"cpu v{_C.cpu_level}", f"forced by PYSEQ_CPU; this machine has v{_C.cpu_level_of_machine}"
    return f"cpu v{_C.cpu_level}", "the widest instruction set of this machine"


def _notes(op: Op, tensors: dict[str, torch.Tensor], kernel: str) -> list[str]:
    notes = []
    if kernel == "reference":
        notes.append("plain PyTorch, one operation at a time: slow")
    for name, t in tensors.items():
        if name in op.float32:
            if t.dtype != torch.float32 and kernel != "reference":
                notes.append(f"{name} is {str(t.dtype).removeprefix('torch.')}: read as float32, converted first")
        elif t.dim() and t.shape[-1] > 1 and t.stride(-1) != 1:
            notes.append(f"{name} is copied first: its last axis has stride {t.stride(-1)}, not 1")
    return notes
