"""Linear layer, with weights packed once for decoding: contract and gradient. Kernels: csrc/linear/."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from .. import _C, reference
from .._library import _LIBRARIES, _TAGS, Kernel, define, runs_on_gpu
from ._check import Dims

_PANEL = 32   # outputs side by side in packed memory
_DATA = (torch.float32, torch.bfloat16, torch.float16)
_AXES = tuple(f"axis {i}" for i in range(16))   # the leading ones of x
_PACKABLE = (torch.float32, torch.bfloat16)


class PackedLinear:
    """A weight in the order in which the kernels read it: panels of 32 outputs, `in` first. Made by `pack_linear`.

    Padded with zeros to 32 outputs, and for bfloat16 to an even `in`; otherwise as large as the weight it replaces.

    Attributes:
        shape: [out, in], that of the weight.
        dtype: float32 or bfloat16.
        panels: [ceil(out / 32), in, 32] float32, or [ceil(out / 32), ceil(in / 2), 32, 2] bfloat16.
    """

    def __init__(self, panels: torch.Tensor, out_features: int, in_features: int) -> None:
        expected = _panels_shape(panels.dtype, out_features, in_features)
        if panels.dtype not in _PACKABLE or panels.shape != expected:
            raise ValueError(
                f"PackedLinear: panels has shape {list(panels.shape)} and dtype {panels.dtype}, expected "
                f"{list(expected)} of float32 or bfloat16, as pack_linear makes them"
            )
        self.panels = panels
        self.out_features = out_features
        self.in_features = in_features

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    @property
    def dtype(self) -> torch.dtype:
        return self.panels.dtype

    @property
    def device(self) -> torch.device:
        return self.panels.device

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes

    def fits(self, x: object, bias: object = None) -> bool:
        """Whether x and the bias are what a decoding step passes, in few enough comparisons for one."""
        return (
            isinstance(x, torch.Tensor) and x.dtype in _DATA and x.layout is torch.strided
            and x.dim() > 0 and x.shape[-1] == self.in_features and x.device == self.panels.device and bias is None
        )

    def unpack(self) -> torch.Tensor:
        """The weight [out, in], bit for bit."""
        return _unpack(self.panels, self.out_features, self.in_features)

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"PackedLinear(shape={list(self.shape)}, dtype={dtype}, nbytes={self.nbytes})"


def _unpack(panels: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    weight = panels.transpose(1, 2).flatten(2) if panels.dim() == 4 else panels.transpose(1, 2)
    return weight.flatten(0, 1)[:out_features, :in_features].contiguous()


def _panels_shape(dtype: torch.dtype, out_features: int, in_features: int) -> tuple[int, ...]:
    panels = -(-out_features // _PANEL)
    if dtype == torch.bfloat16:
        return panels, -(-in_features // 2), _PANEL, 2
    return panels, in_features, _PANEL


def _pack_fake(weight):
    return weight.new_empty(_panels_shape(weight.dtype, *weight.shape))


_LIBRARIES["pyseq"].define("linear_pack(Tensor weight) -> Tensor", tags=_TAGS)
torch.library.register_fake("pyseq::linear_pack", _pack_fake, lib=_LIBRARIES["pyseq"])


def _forward_fake(x, weight, bias, out_features):
    return x.new_empty((*x.shape[:-1], out_features))


def _backward_fake(dy, x, weight, bias, need_x, need_weight, need_bias):
    def like(t, needed):
        return t.new_empty(t.shape) if needed else x.new_empty((0,), dtype=torch.float32)

    return like(x, need_x), like(weight, need_weight), like(bias, need_bias)


def _save(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, weight, bias, ctx.out_features = inputs
    ctx.save_for_backward(x, weight, bias)


def _gradient(kernels: Any, ctx: Any, dy: torch.Tensor) -> tuple:
    x, weight, bias = ctx.saved_tensors
    packed = weight.dim() != 2
    if packed:
        weight = _unpack(weight, ctx.out_features, x.shape[-1])
    need_x, need_weight, need_bias, _ = ctx.needs_input_grad
    need_weight = need_weight and not packed
    dx, dweight, dbias = kernels.backward(dy, x, weight, bias, need_x, need_weight, need_bias)
    return dx if need_x else None, dweight if need_weight else None, dbias if need_bias else None, None


_OP = define(
    "linear",
    forward=Kernel("(Tensor x, Tensor weight, Tensor? bias, int out_features) -> Tensor y", _forward_fake),
    backward=Kernel(
        "(Tensor dy, Tensor x, Tensor weight, Tensor? bias, bool need_x, bool need_weight, bool need_bias) "
        "-> (Tensor dx, Tensor dweight, Tensor dbias)",
        _backward_fake,
    ),
    save=_save,
    gradient=_gradient,
)


def pack_linear(weight: torch.Tensor) -> PackedLinear:
    """Packs a weight for `linear`, which then streams it at memory bandwidth; the weight itself may be freed.

    Args:
        weight: [out, in], float32 or bfloat16, on a CPU. Its gradient does not flow through the packed copy.

    Raises:
        TypeError, ValueError: the weight has the wrong type, dtype, device or shape.
    """
    dims = Dims("pack_linear")
    dims.match("weight", weight, ("out", "in"), _PACKABLE)
    _not_empty(dims, "weight", weight)
    if weight.device.type not in ("cpu", "meta"):
        raise dims.fail("weight", f"on {weight.device}", "a CPU tensor: on a GPU linear() takes the plain weight")
    panels = torch.ops.pyseq.linear_pack(weight.detach())
    return PackedLinear(panels, weight.shape[0], weight.shape[1])


def linear(x: torch.Tensor, weight: torch.Tensor | PackedLinear, bias: torch.Tensor | None = None) -> torch.Tensor:
    r"""y = x W^T + b, the result of `torch.nn.functional.linear`.

    On a CPU, products and sums are float32, with one rounding at the store, and the bits of a row of y depend on that
    row of x alone: not on the other rows, the threads, or whether the weight is packed. On CUDA it is torch's own
    linear: cuBLAS chooses by shape, so that a row's bits may depend on how many rows there are, and
    torch.backends.cuda.matmul decides on TF32 for float32 (`allow_tf32`) and on sums of less than float32 for 16 bits
    (`allow_bf16_reduced_precision_reduction`, `allow_fp16_reduced_precision_reduction`).

    Args:
        x: [..., in], float32, bfloat16 or float16 (float64 runs through `pyseq.reference`).
        weight: [out, in], float32, bfloat16 or float16, packed on the way at each call; or a `PackedLinear`, with which
            few rows run at memory bandwidth. The gradient flows into a plain weight only.
        bias: [out], any float dtype, read as float32.

    Returns:
        y [..., out] in x's dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    if not (isinstance(weight, PackedLinear) and weight.fits(x, bias)):
        _check(x, weight, bias)
    if x.dtype == torch.float64:
        return reference.linear(x, weight, bias)
    data = weight.panels if isinstance(weight, PackedLinear) else weight
    if runs_on_gpu(x):
        return _on_cuda(x, data, bias)
    return _OP.active.forward(x, data, bias, weight.shape[0])


def _check(x: object, weight: object, bias: object) -> None:
    dims = Dims("linear")
    leading = _AXES[: max(x.dim() - 1, 0)] if isinstance(x, torch.Tensor) else ("...",)
    dims.match("x", x, (*leading, "in"))
    assert isinstance(x, torch.Tensor)
    if isinstance(weight, PackedLinear):
        if weight.in_features != x.shape[-1]:
            came = f"packed from shape {list(weight.shape)}"
            raise dims.fail("weight", came, f"[out, in] with in = {x.shape[-1]} (from x)")
        if weight.device != x.device:
            raise dims.fail("weight", f"on device {weight.device}", f"{x.device} (that of x)")
        dims.fix("out", weight.out_features, "weight")
    else:
        dims.match("weight", weight, ("out", "in"), (*_DATA, torch.float64) if x.dtype == torch.float64 else _DATA)
        assert isinstance(weight, torch.Tensor)
        _not_empty(dims, "weight", weight)
    dims.optional("bias", bias, ("out",))


def _not_empty(dims: Dims, name: str, weight: torch.Tensor) -> None:
    if 0 in weight.shape:
        raise ValueError(f"{dims.op}: {name} has shape {list(weight.shape)}, expected [out, in], both at least 1")


def _on_cuda(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """cuBLAS, through torch: there is nothing to gain over it. Mixed dtypes meet in the wider one."""
    wide = torch.promote_types(x.dtype, weight.dtype)
    y = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return y.to(x.dtype)


def _notes(arguments: dict[str, Any]) -> list[str]:
    x, weight, bias = arguments["x"], arguments["weight"], arguments.get("bias")
    if x.is_cuda:
        return []
    plain = "weight is packed on the way, at each call: pyseq.pack_linear does it once"
    notes = ["weight is packed" if isinstance(weight, PackedLinear) else plain]
    dot = x.dtype == weight.dtype == torch.bfloat16 and _C.cpu_has_avx512_bf16
    notes.append(f"products of {'pairs of bfloat16, by vdpbf16ps' if dot else 'float32'}; sums in float32")
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if rows > 1 and x.stride(-1) != 1 and x.flatten(0, -2).stride(0) != 1:
        notes.append(f"x is copied first: its last axis has stride {x.stride(-1)}, not 1")
    if bias is not None and bias.dtype != torch.float32:
        notes.append(f"bias is {str(bias.dtype).removeprefix('torch.')}: read as float32, converted first")
    return notes


_OP.function = linear
_OP.float32 = ("bias",)
_OP.cublas = True
_OP.notes = _notes
