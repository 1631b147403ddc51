"""Mamba-2: a gated state space layer with one decay per head (Dao & Gu, 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from pyseq._library import REGISTRY, runs_on_gpu
from pyseq.layers.exact import Exact, exact_dtype
from pyseq.layers.linear import Linear, in_kernels
from pyseq.layers.norm import GatedRMSNorm
from pyseq.layers.steps import check_steps, draw_steps, inner_width
from pyseq.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from pyseq.ops.ssd import ssd, ssd_step

Tensor = torch.Tensor


class Mamba2State(NamedTuple):
    """What a Mamba-2 layer remembers of the past, both float32 (a step also takes bfloat16)."""

    conv: Tensor  # [B, d_ssm + 2 G N, W-1], the last inputs of the convolution, oldest first
    ssd: Tensor  # [B, H, P, N]


class Mamba2(Exact):
    """[z0, x0, z, x, B, C, dt] = W_in u
    [x, B, C] = silu(conv([x, B, C]))
    S[t] = exp(delta A) S[t-1] + delta x B^T,   delta = clamp(softplus(dt + dt_bias), *dt_limit),   A = -exp(A_log)
    y = norm((S C + D x) * silu(z))             S C + D x, times silu(z) and not normalised, with rmsnorm=False
    out = W_out [silu(z0) * x0, y]

    u, out: [B, T, d_model]. Of the d_inner = expand * d_model channels d_ssm (None: all) go through the recurrence, in
    H = d_ssm / headdim heads of P = headdim channels with one A, D and dt each (D_has_hdim: one D per channel), the
    rest through z0 and x0 alone. `ngroups` B and C of N = d_state serve H / ngroups heads each, and the norm takes its
    mean over d_ssm / ngroups channels. W = d_conv. A_log, D, dt_bias and norm.weight stay float32 when the layer is
    cast to a half type.

    norm_before_gate: normalise first, gate last. norm_eps is the norm's.
    A_init_range: the initial A are uniform in -[low, high]. dt_min .. dt_init_floor: the initial steps are log-uniform
    in [dt_min, dt_max], at least dt_init_floor. conv_init: the convolution's initial weights are uniform in
    [-conv_init, conv_init]; None leaves them to torch.
    chunk_size, use_mem_eff_path and sequence_parallel are accepted so that code written for mamba-ssm runs: there is
    one path, and its kernels choose their chunks. process_group must be None: no layer here is cut across processes.
    layer_idx is kept and not used. d_inner replaces expand.
    """

    exact = ("A_log", "D", "dt_bias")
    d_model: int
    d_inner: int
    d_ssm: int
    d_state: int
    d_conv: int
    headdim: int
    ngroups: int
    chunk_size: int

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: Sequence[float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: Sequence[float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: None = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        d_inner: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if process_group is not None:
            raise ValueError("process_group must be None: a layer is not cut across processes here")
        flags = {
            "D_has_hdim": D_has_hdim, "rmsnorm": rmsnorm, "norm_before_gate": norm_before_gate, "bias": bias,
            "conv_bias": conv_bias,
        }  # fmt: skip
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise ValueError(f"{name} must be True or False, got {flag!r}")
        d_inner = inner_width(d_model, expand) if d_inner is None else d_inner
        d_ssm = d_inner if d_ssm is None else d_ssm
        self._take_sizes(
            d_model=d_model, d_state=d_state, d_conv=d_conv, headdim=headdim, ngroups=ngroups, d_inner=d_inner,
            d_ssm=d_ssm, chunk_size=chunk_size,
        )  # fmt: skip
        self._take_numbers(conv_init, A_init_range, dt_min, dt_max, dt_init_floor, dt_limit, norm_eps)
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate = D_has_hdim, rmsnorm, norm_before_gate
        self.layer_idx = layer_idx

        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        exact: dict[str, Any] = {"device": device, "dtype": exact_dtype(dtype)}
        channels = d_ssm + 2 * ngroups * d_state
        d_mlp = d_inner - d_ssm
        self.parts = [d_mlp, d_mlp, d_ssm, channels, self.nheads]
        self.in_proj = Linear(d_model, sum(self.parts), bias=bias, **kind)
        self.conv1d = torch.nn.Conv1d(
            channels, channels, d_conv, groups=channels, padding=d_conv - 1, bias=conv_bias, **kind
        )
        self.dt_bias = torch.nn.Parameter(torch.empty(self.nheads, **exact))
        self.A_log = torch.nn.Parameter(torch.empty(self.nheads, **exact))
        self.D = torch.nn.Parameter(torch.empty(d_ssm if D_has_hdim else self.nheads, **exact))
        self.norm = GatedRMSNorm(d_ssm, norm_eps, d_ssm // ngroups, norm_before_gate, **kind) if rmsnorm else None
        self.out_proj = Linear(d_inner, d_model, bias=bias, **kind)
        # Flags that optimisers and model initialisers of the Mamba family look for.
        for p in (self.dt_bias, self.A_log, self.D):
            p._no_weight_decay = True  # type: ignore[attr-defined]
        self.dt_bias._no_reinit = True  # type: ignore[attr-defined]
        self.reset_parameters()

    def _take_sizes(self, **sizes: Any) -> None:
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
            setattr(self, name, size)
        if self.d_ssm > self.d_inner:
            raise ValueError(f"d_ssm must be at most d_inner = {self.d_inner}, got {self.d_ssm}")
        if self.d_ssm % self.headdim:
            raise ValueError(f"headdim must divide d_ssm = {self.d_ssm}, got {self.headdim}")
        self.nheads = self.d_ssm // self.headdim
        if self.nheads % self.ngroups:
            raise ValueError(f"ngroups must divide the {self.nheads} heads, got {self.ngroups}")

    def _take_numbers(
        self, conv_init: Any, A_init_range: Any, dt_min: Any, dt_max: Any, floor: Any, dt_limit: Any, norm_eps: Any
    ) -> None:
        if conv_init is not None and not 0 <= conv_init < math.inf:
            raise ValueError(f"conv_init must be None or a number >= 0, got {conv_init!r}")
        low, high = _pair("A_init_range", A_init_range)
        if not 0 < low <= high < math.inf:
            raise ValueError(f"A_init_range must satisfy 0 < low <= high, got {A_init_range!r}")
        check_steps(dt_min, dt_max, floor)
        least, most = _pair("dt_limit", dt_limit)
        if not 0 <= least <= most or math.isinf(least):
            raise ValueError(f"dt_limit must satisfy 0 <= low <= high, got {dt_limit!r}")
        if isinstance(norm_eps, bool) or not 0 < norm_eps < math.inf:
            raise ValueError(f"norm_eps must be a positive number, got {norm_eps!r}")
        self.conv_init, self.A_init_range, self.dt_limit = conv_init, (low, high), (least, most)
        self.dt_min, self.dt_max, self.dt_init_floor = dt_min, dt_max, floor

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws A, D and the steps; the projections and the convolution keep torch's own initialisation."""
        if self.conv_init is not None:
            self.conv1d.weight.uniform_(-self.conv_init, self.conv_init)
        draw_steps(self.dt_bias, self.dt_min, self.dt_max, self.dt_init_floor)
        self.A_log.uniform_(*self.A_init_range).log_()
        self.D.fill_(1.0)

    def forward(
        self, x: Tensor, state: Mamba2State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Mamba2State]:
        """x [B, T, d_model] -> (y, state after the last token). `state` is not changed; gradients flow through both."""
        self._check(x, 3)
        conv, S = (None, None) if state is None else state
        z0, x0, z, xBC, dt = self.in_proj(x).split(self.parts, -1)
        xBC, conv = causal_conv1d(
            xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias,
            activation="silu", state=conv, cu_seqlens=cu_seqlens, return_state=True,
        )  # fmt: skip
        inner, B, C = self._select(xBC)
        y, S = ssd(
            inner, dt, self.A(), B, C, self._skip(), self._gate(z), self.dt_bias,
            dt_softplus=True, dt_limit=self.dt_limit, state=S, cu_seqlens=cu_seqlens, return_state=True,
        )  # fmt: skip
        return self.out_proj(self._merge(y.flatten(-2), z, z0, x0, self.norm)), Mamba2State(conv, S)

    def step(self, x: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        """x [B, d_model], one token -> (y, state). With grad mode off, `state` is updated in place and returned."""
        self._check(x, 2)
        if torch.is_grad_enabled():
            y, state = self(x[:, None], state)
            return y[:, 0], state
        z0, x0, z, xBC, dt = self.in_proj(x).split(self.parts, -1)
        if self._fuses():
            return self.out_proj(self._merge(self._fused(state)(z, xBC, dt), z, z0, x0, None)), state
        xBC = causal_conv1d_step(state.conv, xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu")
        inner, B, C = self._select(xBC)
        y = ssd_step(
            state.ssd, inner, dt, self.A(), B, C, self._skip(), self._gate(z), self.dt_bias,
            dt_softplus=True, dt_limit=self.dt_limit,
        )  # fmt: skip
        return self.out_proj(self._merge(y.flatten(-2), z, z0, x0, self.norm)), state

    def stepper(self, state: Mamba2State) -> Callable[[Tensor], Tensor]:
        """x [B, d_model] -> y for a loop in inference mode: `step` without its checks, its constants computed once."""
        in_proj, out_proj = self.in_proj.stepper(self.in_proj.bias), self.out_proj.stepper(self.out_proj.bias)
        parts = self.parts
        if self._fuses():
            between = self._fused(state)

            def fused(x: Tensor) -> Tensor:
                z0, x0, z, xBC, dt = in_proj(x).split_with_sizes(parts, -1)
                return out_proj(self._merge(between(z, xBC, dt), z, z0, x0, None))

            return fused
        if not in_kernels(self.A_log):
            return lambda x: self.step(x, state)[0]
        conv_step, ssd_step = REGISTRY["causal_conv1d"].active.step, REGISTRY["ssd"].active.step
        weight, conv_bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        A, D, dt_bias, (low, high) = self.A(), self._skip(), self.dt_bias, self.dt_limit
        norm = None if self.norm is None else self.norm.stepper()
        conv, S = state

        def step(x: Tensor) -> Tensor:
            z0, x0, z, xBC, dt = in_proj(x).split_with_sizes(parts, -1)  # `split` takes twice as long
            inner, B, C = self._select(conv_step(conv, xBC, weight, conv_bias, True))
            y = ssd_step(S, inner, dt, A, B, C, D, self._gate(z), dt_bias, True, low, high)
            return out_proj(self._merge(y.flatten(-2), z, z0, x0, norm))

        return step

    def _fuses(self) -> bool:
        """On a GPU all between the projections is one op. On a CPU the ops run one by one, bit for bit the sequence."""
        return runs_on_gpu(self.A_log) and self.A_log.dtype != torch.float64

    def _fused(self, state: Mamba2State) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """z, xBC, dt -> what W_out multiplies, but for z0 and x0; `state` is updated in place."""
        kernel, norm = REGISTRY["mamba2_step"].active.step, self.norm
        weights = self.conv1d.weight.squeeze(1), self.conv1d.bias, self.A(), self._skip(), self.dt_bias
        weight, eps, size = (None, 1.0, 1) if norm is None else (norm.weight, norm.eps, norm.group_size)
        options = *self.dt_limit, eps, size, self.norm_before_gate
        return lambda z, xBC, dt: kernel(*state, z, xBC, dt, *weights, weight, *options)

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Mamba2State:
        """The state before the first token: zeros, on the layer's device, float32 unless the layer is float64.

        A state of dtype bfloat16 is for `step` alone: half the memory, and what it remembers is rounded at each token.
        A head that decays by less than 2^-9 a token, delta |A| < 0.002, then never forgets. Use float32 unless reading
        and writing the state is what bounds a step.
        """
        kind: dict[str, Any] = {"device": device or self.A_log.device, "dtype": dtype or self.A_log.dtype}
        return Mamba2State(
            torch.zeros(batch_size, self.conv1d.in_channels, self.d_conv - 1, **kind),
            torch.zeros(batch_size, self.nheads, self.headdim, self.d_state, **kind),
        )

    def A(self) -> Tensor:
        return -torch.exp(self.A_log)

    def _skip(self) -> Tensor:
        return self.D.view(self.nheads, self.headdim) if self.D_has_hdim else self.D

    def _gate(self, z: Tensor) -> Tensor | None:
        """The gate where the recurrence applies it: without a norm behind it."""
        return None if self.rmsnorm else z.unflatten(-1, (self.nheads, self.headdim))

    def _select(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., H, P], B and C [..., G, N] in what the convolution returns: views."""
        width = self.ngroups * self.d_state
        x, B, C = xBC.split_with_sizes([self.d_ssm, width, width], -1)
        groups = (self.ngroups, self.d_state)
        return x.unflatten(-1, (self.nheads, self.headdim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _merge(self, y: Tensor, z: Tensor, z0: Tensor, x0: Tensor, norm: Callable[..., Tensor] | None) -> Tensor:
        """What W_out multiplies: y through the norm, behind the channels that skip the recurrence."""
        y = y if norm is None else norm(y, z)
        return torch.cat([F.silu(z0) * x0, y], -1) if z0.shape[-1] else y

    def _check(self, x: Tensor, dim: int) -> None:
        if x.dim() != dim or x.shape[-1] != self.d_model:
            axes = "[B, T, d_model]" if dim == 3 else "[B, d_model]"
            raise ValueError(f"x must be {axes} with d_model = {self.d_model}, got {list(x.shape)}")

    def extra_repr(self) -> str:
        text = f"d_model={self.d_model}, d_inner={self.d_inner}, d_state={self.d_state}, d_conv={self.d_conv}"
        text = f"{text}, headdim={self.headdim}, ngroups={self.ngroups}"
        return text if self.d_ssm == self.d_inner else f"{text}, d_ssm={self.d_ssm}"


def _pair(name: str, value: Any) -> tuple[float, float]:
    numbers = list(value) if isinstance(value, tuple | list) else []
    if len(numbers) != 2 or any(isinstance(v, bool) or not isinstance(v, int | float) for v in numbers):
        raise ValueError(f"{name} must be two numbers (low, high), got {value!r}")
    return numbers[0], numbers[1]
