"""Argument errors: each names the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from .. import _C

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int32, torch.int64)


class Dims:
    """The sizes an op's letters have taken so far: the first tensor that names a letter fixes its size.

    >>> dims = Dims("selective_scan")
    >>> dims.match("u", torch.zeros(2, 8, 4), "BTD")
    >>> dims.match("A", torch.zeros(5, 16), "DN")
    Traceback (most recent call last):
    ...
    ValueError: selective_scan: A has shape [5, 16], expected [D, N] with D = 4 (from u)
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.size: dict[str, int] = {}
        self._source: dict[str, str] = {}
        self._device: torch.device | None = None

    def __getitem__(self, letter: str) -> int:
        return self.size[letter]

    def fix(self, letter: str, size: int, source: str) -> None:
        self.size[letter] = size
        self._source[letter] = source

    def match(self, name: str, t: object, letters: Sequence[str], dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{self.op}: {name} is {type(t).__name__}, expected a tensor [{', '.join(letters)}]")
        if t.dtype not in dtypes:
            expected = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise TypeError(f"{self.op}: {name} has dtype {str(t.dtype).removeprefix('torch.')}, expected {expected}")
        if t.layout is not torch.strided:
            raise TypeError(f"{self.op}: {name} has layout {t.layout}, expected a dense tensor (torch.strided)")
        if self._device is None:
            self._device, self._source["device"] = t.device, name
            self._check_device(name, t.device.type)
        elif t.device != self._device:
            raise ValueError(
                f"{self.op}: {name} is on device {t.device}, expected {self._device} (that of {self._source['device']})"
            )
        size = self.size
        if t.dim() == len(letters):
            for letter, n in zip(letters, t.shape, strict=True):
                if size.setdefault(letter, n) != n:
                    break
                self._source.setdefault(letter, name)
            else:
                return
        known = [f"{c} = {size[c]} (from {self._source[c]})" for c in letters if self._source.get(c, name) != name]
        suffix = f" with {', '.join(known)}" if known else ""
        raise ValueError(
            f"{self.op}: {name} has shape {list(t.shape)}, expected [{', '.join(letters)}]{suffix}"
        )

    def _check_device(self, name: str, kind: str) -> None:
        if kind == "cuda" and not _C.cuda_ops:
            raise ValueError(
                f"{self.op}: {name} is on a GPU, and this pyseq was built without CUDA kernels (no nvcc was found): "
                "move the tensors to the CPU, or build pyseq from source where nvcc is"
            )
        if kind not in ("cpu", "cuda", "meta"):
            raise ValueError(f"{self.op}: {name} is on device {kind}, expected cpu or cuda")

    def optional(self, name: str, t: object, letters: Sequence[str], dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
        if t is not None:
            self.match(name, t, letters, dtypes)

    def in_place(self, name: str, t: torch.Tensor) -> None:
        """A tensor that is written to: no two elements may share memory."""
        if any(n > 1 and step == 0 for n, step in zip(t.shape, t.stride(), strict=True)):
            raise self.fail(name, f"expanded, with strides {t.stride()}", "memory of its own for every element")

    def flag(self, name: str, value: object) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"{self.op}: {name} is {type(value).__name__}, expected True or False")

    def fail(self, name: str, came: object, expected: str) -> ValueError:
        return ValueError(f"{self.op}: {name} is {came}, expected {expected}")


def readable(t: torch.Tensor) -> bool:
    """Whether values are looked at: in eager mode and on a CPU. Elsewhere the kernels answer wrong ones with NaN."""
    plain = type(t) in (torch.Tensor, torch.nn.Parameter)
    return t.device.type == "cpu" and not torch.compiler.is_compiling() and plain


def check_cu_seqlens(dims: Dims, cu_seqlens: object) -> None:
    """Fixes S, the number of packed sequences. Values are read only in eager mode and on a CPU."""
    dims.match("cu_seqlens", cu_seqlens, ("S + 1",), _INTEGERS)
    assert isinstance(cu_seqlens, torch.Tensor)
    if dims["S + 1"] < 2:
        raise dims.fail("cu_seqlens", f"of length {dims['S + 1']}", "[S + 1] with S >= 1")
    if dims["B"] != 1:
        raise ValueError(f"{dims.op}: cu_seqlens packs sequences into a batch of 1, but B is {dims['B']}")
    if readable(cu_seqlens):
        values = cu_seqlens.tolist()
        ordered = all(a <= b for a, b in pairwise(values))
        if values[0] != 0 or values[-1] != dims["T"] or not ordered:
            raise dims.fail("cu_seqlens", _short(values), f"0 to T = {dims['T']}, non-decreasing")
    dims.fix("S", dims["S + 1"] - 1, "cu_seqlens")


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"


def is_float64(*tensors: torch.Tensor | None) -> bool:
    """float64 data runs through the reference: plain PyTorch, to the last digit."""
    return any(t is not None and t.dtype == torch.float64 for t in tensors)
