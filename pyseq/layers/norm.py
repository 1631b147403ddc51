"""The norm with a gate at the end of a Mamba-2 layer, and the norm of RWKV-7."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from pyseq._library import REGISTRY
from pyseq.layers.exact import Exact, exact_dtype
from pyseq.layers.linear import in_kernels
from pyseq.ops.rms_norm_gated import rms_norm_gated

Tensor = torch.Tensor


class GatedRMSNorm(Exact):
    """v = x silu(z); y = weight * v / sqrt(mean(v^2) + eps), the mean over groups of `group_size` channels.

    With norm_before_gate v = x, and the gate multiplies y. x, z: [..., size]; y has x's type. `weight` stays float32
    when the module is cast to a half type.
    """

    exact = ("weight",)

    def __init__(
        self,
        size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.norm_before_gate = eps, norm_before_gate
        self.group_size = size if group_size is None else group_size
        self.weight = torch.nn.Parameter(torch.ones(size, device=device, dtype=exact_dtype(dtype)))
        self.weight._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return rms_norm_gated(  # type: ignore[return-value]
            x, self.weight, z, eps=self.eps, group_size=self.group_size, norm_before_gate=self.norm_before_gate
        )

    def stepper(self) -> Callable[[Tensor, Tensor], Tensor]:
        """forward for a loop in inference mode, without the op's checks."""
        if not in_kernels(self.weight):
            return self
        kernel = REGISTRY["rms_norm_gated"].active.forward
        weight, eps, size, before = self.weight, self.eps, self.group_size, self.norm_before_gate
        return lambda x, z: kernel(x, weight, z, None, eps, size, before)[0]

    def extra_repr(self) -> str:
        text = f"{self.weight.numel()}, group_size={self.group_size}, eps={self.eps}"
        return f"{text}, norm_before_gate=True" if self.norm_before_gate else text


class LayerNorm(Exact):
    """y = weight * (x - mean(x)) / sqrt(var(x) + eps) + bias over the last axis, in the type of the weight.

    That is float32, in a layer of a half type too: what follows in RWKV-7 rounds once, when it has mixed two tokens.
    """

    exact = ("weight", "bias")

    def __init__(
        self,
        size: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(size, device=device, dtype=exact_dtype(dtype)))
        self.bias = torch.nn.Parameter(torch.zeros(size, device=device, dtype=exact_dtype(dtype)))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.bias, self.eps)

    def stepper(self) -> Callable[[Tensor], Tensor]:
        """forward for a loop in inference mode, x being of the weight's type."""
        weight, bias, shape, eps = self.weight, self.bias, self.weight.shape, self.eps
        return lambda x: torch.layer_norm(x, shape, weight, bias, eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"
