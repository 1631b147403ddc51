"""Mamba: a gated selective state space layer (Gu & Dao, 2023), and its FalconMamba variant (Zuo et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pyseq._library import REGISTRY, runs_on_gpu
from pyseq.layers.exact import Exact, exact_dtype
from pyseq.layers.linear import Linear, in_kernels
from pyseq.layers.steps import check_steps, draw_steps, inner_width
from pyseq.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from pyseq.ops.rms_norm_gated import rms_norm_gated
from pyseq.ops.selective_scan import selective_scan, selective_scan_step


class MambaState(NamedTuple):
    """What a Mamba layer remembers of the past, both float32."""

    conv: torch.Tensor  # [B, D, W-1], the last inputs of the convolution, oldest first
    scan: torch.Tensor  # [B, D, N]


class Mamba(Exact):
    """[u, z] = W_in x
    u = silu(conv(u))
    [dt, B, C] = W_x u
    h[t] = exp(dt A) h[t-1] + dt B u,   dt = softplus(W_dt dt + b_dt),   A = -exp(A_log)
    y = W_out ((<C, h> + D u) * silu(z))

    x, y: [B, T, d_model]; D = expand * d_model channels (or `d_inner`), N = d_state, W = d_conv, R = dt_rank
    (ceil(d_model / 16) for "auto"). A_log, D and dt_proj.bias stay float32 when the layer is cast to a half type.

    mixer_rms_eps: None is Mamba. A number is FalconMamba: dt (before W_dt), B and C are divided by their root mean
    square, sqrt(mean(v^2) + mixer_rms_eps), with no weight.
    dt_min .. dt_init_floor: the initial steps are log-uniform in [dt_min, dt_max], at least dt_init_floor; W_dt is
    uniform ("random") or constant ("constant") at dt_scale / sqrt(R). use_fast_path is accepted so that code written
    for mamba-ssm runs; there is one path. layer_idx is kept and not used.
    """

    exact = ("A_log", "D", "dt_proj.bias")

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        d_inner: int | None = None,
        mixer_rms_eps: float | None = None,
    ) -> None:
        super().__init__()
        if dt_rank == "auto":
            dt_rank = math.ceil(d_model / 16)
        if d_inner is None:
            d_inner = inner_width(d_model, expand)
        sizes = {"d_model": d_model, "d_state": d_state, "d_conv": d_conv, "dt_rank": dt_rank, "d_inner": d_inner}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        check_steps(dt_min, dt_max, dt_init_floor)
        if dt_init not in ("random", "constant"):
            raise ValueError(f'dt_init must be "random" or "constant", got {dt_init!r}')
        if mixer_rms_eps is not None and not 0 < mixer_rms_eps < math.inf:
            raise ValueError(f"mixer_rms_eps must be None or a positive number, got {mixer_rms_eps!r}")
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner, self.dt_rank = d_inner, int(dt_rank)
        self.dt_min, self.dt_max, self.dt_init, self.dt_scale = dt_min, dt_max, dt_init, dt_scale
        self.dt_init_floor, self.mixer_rms_eps, self.layer_idx = dt_init_floor, mixer_rms_eps, layer_idx

        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        exact: dict[str, Any] = {"device": device, "dtype": exact_dtype(dtype)}
        self.in_proj = Linear(d_model, 2 * d_inner, bias=bias, **kind)
        self.conv1d = torch.nn.Conv1d(
            d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1, bias=conv_bias, **kind
        )
        self.x_proj = Linear(d_inner, self.dt_rank + 2 * d_state, bias=False, **kind)
        self.dt_proj = Linear(self.dt_rank, d_inner, bias=False, **kind)
        self.dt_proj.bias = torch.nn.Parameter(torch.empty(d_inner, **exact))
        self.A_log = torch.nn.Parameter(torch.empty(d_inner, d_state, **exact))
        self.D = torch.nn.Parameter(torch.empty(d_inner, **exact))
        self.out_proj = Linear(d_inner, d_model, bias=bias, **kind)
        # Flags that optimisers and model initialisers of the Mamba family look for.
        self.A_log._no_weight_decay = True  # type: ignore[attr-defined]
        self.D._no_weight_decay = True  # type: ignore[attr-defined]
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws A, D and the steps; the projections and the convolution keep torch's own initialisation."""
        std = self.dt_rank**-0.5 * self.dt_scale
        if self.dt_init == "constant":
            self.dt_proj.weight.fill_(std)
        else:
            self.dt_proj.weight.uniform_(-std, std)
        bias = self.dt_proj.bias
        draw_steps(bias, self.dt_min, self.dt_max, self.dt_init_floor)
        self.A_log.copy_(torch.log(torch.arange(1, self.d_state + 1, device=bias.device, dtype=bias.dtype)))
        self.D.fill_(1.0)

    def forward(
        self, x: torch.Tensor, state: MambaState | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, MambaState]:
        """x [B, T, d_model] -> (y, state after the last token). `state` is not changed; gradients flow through both."""
        self._check(x, 3)
        conv, scan = (None, None) if state is None else state
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv = causal_conv1d(
            u, self.conv1d.weight.squeeze(1), self.conv1d.bias,
            activation="silu", state=conv, cu_seqlens=cu_seqlens, return_state=True,
        )  # fmt: skip
        dt, B, C = self.select(u)
        y, scan = selective_scan(
            u, dt, self.A(), B, C, self.D, z, self.dt_proj.bias,
            dt_softplus=True, state=scan, cu_seqlens=cu_seqlens, return_state=True,
        )  # fmt: skip
        return self.out_proj(y), MambaState(conv, scan)

    def step(self, x: torch.Tensor, state: MambaState) -> tuple[torch.Tensor, MambaState]:
        """x [B, d_model], one token -> (y, state). With grad mode off, `state` is updated in place and returned."""
        self._check(x, 2)
        if torch.is_grad_enabled():
            y, state = self(x[:, None], state)
            return y[:, 0], state
        u, z = self.in_proj(x).chunk(2, dim=-1)
        if self._fuses():
            return self.out_proj(self._fused(state)(u, z)), state
        u = causal_conv1d_step(state.conv, u, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu")
        dt, B, C = self.select(u)
        y = selective_scan_step(state.scan, u, dt, self.A(), B, C, self.D, z, self.dt_proj.bias, dt_softplus=True)
        return self.out_proj(y), state

    def stepper(self, state: MambaState) -> Callable[[torch.Tensor], torch.Tensor]:
        """x [B, d_model] -> y for a loop in inference mode: `step` without its checks, its constants computed once."""
        in_proj, out_proj = self.in_proj.stepper(self.in_proj.bias), self.out_proj.stepper(self.out_proj.bias)
        if self._fuses():
            between = self._fused(state)
            return lambda x: out_proj(between(*in_proj(x).chunk(2, -1)))
        if not in_kernels(self.A_log):
            return lambda x: self.step(x, state)[0]
        conv_step, scan_step = REGISTRY["causal_conv1d"].active.step, REGISTRY["selective_scan"].active.step
        x_proj, dt_proj = self.x_proj.stepper(), self.dt_proj.stepper()
        weight, conv_bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        A, D, dt_bias, parts = self.A(), self.D, self.dt_proj.bias, [self.dt_rank, self.d_state, self.d_state]
        normed = self.mixer_rms_eps is not None
        conv, scan = state

        def step(x: torch.Tensor) -> torch.Tensor:
            u, z = in_proj(x).chunk(2, -1)
            u = conv_step(conv, u, weight, conv_bias, True)
            dt, B, C = x_proj(u).split_with_sizes(parts, -1)  # `split` takes twice as long
            if normed:
                dt, B, C = self.normalise(dt, B, C)
            return out_proj(scan_step(scan, u, dt_proj(dt), A, B, C, D, z, dt_bias, True))

        return step

    def _fuses(self) -> bool:
        """On a GPU all between the two large projections is one op. On a CPU the ops run one by one: as fast for one
        row, faster for more, and bit for bit what the sequence form gives.
        """
        return runs_on_gpu(self.A_log) and self.A_log.dtype != torch.float64 and self.x_proj.packed is None

    def _fused(self, state: MambaState) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """u, z [B, D] -> <C, h> .. silu(z); `state` is updated in place."""
        kernel, eps = REGISTRY["mamba_step"].active.step, self.mixer_rms_eps
        weight = self.conv1d.weight.squeeze(1)
        weights = weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight, self.dt_proj.bias, self.A(), self.D
        return lambda u, z: kernel(*state, u, z, *weights, eps)

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MambaState:
        """The state before the first token: zeros, on the layer's device, float32 unless the layer is float64."""
        kind: dict[str, Any] = {"device": device or self.A_log.device, "dtype": dtype or self.A_log.dtype}
        return MambaState(
            torch.zeros(batch_size, self.d_inner, self.d_conv - 1, **kind),
            torch.zeros(batch_size, self.d_inner, self.d_state, **kind),
        )

    def A(self) -> torch.Tensor:
        return -torch.exp(self.A_log)

    def select(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The step (before its bias and softplus), B and C that the input chooses."""
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if self.mixer_rms_eps is not None:
            dt, B, C = self.normalise(dt, B, C)
        return self.dt_proj.project(dt), B, C

    def normalise(self, *values: torch.Tensor) -> list[Any]:
        eps = self.mixer_rms_eps or 0.0
        return [rms_norm_gated(v, v.new_ones(v.shape[-1]), eps=eps) for v in values]

    def _check(self, x: torch.Tensor, dim: int) -> None:
        if x.dim() != dim or x.shape[-1] != self.d_model:
            axes = "[B, T, d_model]" if dim == 3 else "[B, d_model]"
            raise ValueError(f"x must be {axes} with d_model = {self.d_model}, got {list(x.shape)}")

    def extra_repr(self) -> str:
        text = f"d_model={self.d_model}, d_inner={self.d_inner}, d_state={self.d_state}, d_conv={self.d_conv}"
        return text if self.mixer_rms_eps is None else f"{text}, mixer_rms_eps={self.mixer_rms_eps}"
