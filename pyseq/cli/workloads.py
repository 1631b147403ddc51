"""The calls that `pyseq bench` times: the sizes of one layer of a 130 M model over 2048 tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import pyseq

from .bench import tensor_bytes

T, D, N, W, D_MODEL = 2048, 1536, 16, 4, 768
H, P, N2 = 24, 64, 128  # of Mamba-2
R, GD = 12, 16  # heads of RWKV-7, of 64, and of a gated delta net, of 128


@dataclasses.dataclass(frozen=True)
class Work:
    name: str
    call: Callable[[], Any]
    bytes: int


def _normal(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _training(function: Callable[..., Any], arguments: dict[str, Any]) -> list[Work]:
    """Forward alone, and forward with backward, which also reads outputs' gradients and writes those of inputs."""

    def forward() -> Any:
        with torch.no_grad():
            return function(**arguments)

    def both() -> Any:
        outputs = function(**leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, inputs, [torch.ones_like(y) for y in outputs])

    leaves = {n: v.clone().requires_grad_() if isinstance(v, Tensor) else v for n, v in arguments.items()}
    inputs: Sequence[Tensor] = [v for v in leaves.values() if isinstance(v, Tensor)]
    once = tensor_bytes(arguments) + tensor_bytes(forward())
    return [Work("forward", forward, once), Work("forward + backward", both, 2 * once + tensor_bytes(arguments))]


def _step(function: Callable[..., Any], state: Tensor, arguments: dict[str, Any]) -> Work:
    def call() -> Any:
        with torch.no_grad():
            return function(state, **arguments)

    return Work("step, batch 1", call, 2 * tensor_bytes(state) + tensor_bytes(arguments) + tensor_bytes(call()))


def causal_conv1d(dtype: torch.dtype, device: str) -> list[Work]:
    weights = {"weight": _normal(D, W, device=device), "bias": _normal(D, device=device), "activation": "silu"}
    return [
        *_training(pyseq.causal_conv1d, {"x": _normal(1, T, D, device=device, dtype=dtype), **weights}),
        _step(
            pyseq.causal_conv1d_step,
            _normal(1, D, W - 1, device=device),
            {"x": _normal(1, D, device=device, dtype=dtype), **weights},
        ),
    ]


def selective_scan(dtype: torch.dtype, device: str) -> list[Work]:
    def data(*time: int) -> dict[str, Any]:
        wide = {name: _normal(1, *time, D, device=device, dtype=dtype) for name in ("u", "dt", "z")}
        narrow = {name: _normal(1, *time, N, device=device, dtype=dtype) for name in ("B", "C")}
        weights = {"A": -_normal(D, N, device=device).exp(), "D": _normal(D, device=device)}
        return {**wide, **narrow, **weights, "dt_bias": _normal(D, device=device) - 4, "dt_softplus": True}

    return [
        *_training(pyseq.selective_scan, data(T)),
        _step(pyseq.selective_scan_step, _normal(1, D, N, device=device), data()),
    ]


def ssd(dtype: torch.dtype, device: str) -> list[Work]:
    def data(*time: int) -> dict[str, Any]:
        narrow = {name: _normal(1, *time, 1, N2, device=device, dtype=dtype) for name in ("B", "C")}
        weights = {"A": -_normal(H, device=device).exp(), "D": _normal(H, device=device)}
        return {
            "x": _normal(1, *time, H, P, device=device, dtype=dtype),
            "dt": _normal(1, *time, H, device=device, dtype=dtype),
            **narrow, **weights, "dt_bias": _normal(H, device=device) - 4, "dt_softplus": True,
        }  # fmt: skip

    rounded = _step(pyseq.ssd_step, _normal(1, H, P, N2, device=device, dtype=torch.bfloat16), data())
    return [
        *_training(pyseq.ssd, data(T)),
        _step(pyseq.ssd_step, _normal(1, H, P, N2, device=device), data()),
        dataclasses.replace(rounded, name=f"{rounded.name}, bfloat16 state"),
    ]


def delta_rule(dtype: torch.dtype, device: str) -> list[Work]:
    """RWKV-7: corrections along a unit vector, by half."""

    def data(*time: int) -> dict[str, Any]:
        q, k, v, unit = (_normal(1, *time, R, P, device=device, dtype=dtype) for _ in range(4))
        unit = torch.nn.functional.normalize(unit, dim=-1)
        g = -_normal(1, *time, R, P, device=device).sigmoid()
        return {"q": q, "k": k, "v": v, "a": -unit, "b": unit / 2, "g": g}

    return [
        *_training(pyseq.delta_rule, data(T)),
        _step(pyseq.delta_rule_step, _normal(1, R, P, P, device=device), data()),
    ]


def gated_delta_rule(dtype: torch.dtype, device: str) -> list[Work]:
    def data(*time: int) -> dict[str, Any]:
        q, k, v = (_normal(1, *time, GD, N2, device=device, dtype=dtype) for _ in range(3))
        q, k = (torch.nn.functional.normalize(t, dim=-1) for t in (q, k))
        g, beta = (_normal(1, *time, GD, device=device).sigmoid() for _ in range(2))
        return {"q": q, "k": k, "v": v, "g": -g, "beta": beta}

    return [
        *_training(pyseq.gated_delta_rule, data(T)),
        _step(pyseq.gated_delta_rule_step, _normal(1, GD, N2, N2, device=device), data()),
    ]


def ema(dtype: torch.dtype, device: str) -> list[Work]:
    def data(*time: int) -> dict[str, Any]:
        p = torch.sigmoid(_normal(1, *time, device=device)).clamp(1e-4, 1 - 1e-4)
        return {"x": _normal(1, *time, D_MODEL, device=device, dtype=dtype), "p": p}

    return [*_training(pyseq.ema, data(T)), _step(pyseq.ema_step, _normal(1, D_MODEL, device=device), data())]


def rms_norm_gated(dtype: torch.dtype, device: str) -> list[Work]:
    x, residual = (_normal(1, T, D_MODEL, device=device, dtype=kind) for kind in (dtype, torch.float32))
    return _training(pyseq.rms_norm_gated, {"x": x, "weight": _normal(D_MODEL, device=device), "residual": residual})


def mamba_step(dtype: torch.dtype, device: str) -> list[Work]:
    """Between the projections of the layer; the weights are of the data's type."""
    rank = D_MODEL // 16
    data = {name: _normal(1, D, device=device, dtype=dtype) for name in ("x", "z")}
    data |= {
        "conv_state": _normal(1, D, W - 1, device=device),
        "conv_weight": _normal(D, W, device=device, dtype=dtype),
        "conv_bias": _normal(D, device=device, dtype=dtype),
        "x_proj_weight": _normal(rank + 2 * N, D, device=device, dtype=dtype) / D**0.5,
        "dt_proj_weight": _normal(D, rank, device=device, dtype=dtype) / rank**0.5,
        "dt_bias": _normal(D, device=device) - 4,
        "A": -_normal(D, N, device=device).exp(),
        "D": _normal(D, device=device),
    }

    def function(state: Tensor, **arguments: Any) -> Tensor:
        return pyseq.mamba_step(state=state, **arguments)

    return [_step(function, _normal(1, D, N, device=device), data)]


def mamba2_step(dtype: torch.dtype, device: str) -> list[Work]:
    """Between the projections of the layer; the convolution's weights are of the data's type."""
    channels = H * P + 2 * N2
    data = {
        "z": _normal(1, H * P, device=device, dtype=dtype),
        "xBC": _normal(1, channels, device=device, dtype=dtype),
        "dt": _normal(1, H, device=device, dtype=dtype),
        "conv_state": _normal(1, channels, W - 1, device=device),
        "conv_weight": _normal(channels, W, device=device, dtype=dtype),
        "conv_bias": _normal(channels, device=device, dtype=dtype),
        "A": -_normal(H, device=device).exp(),
        "D": _normal(H, device=device),
        "dt_bias": _normal(H, device=device) - 4,
        "norm_weight": _normal(H * P, device=device),
    }

    def function(state: Tensor, **arguments: Any) -> Tensor:
        return pyseq.mamba2_step(state=state, **arguments)

    return [_step(function, _normal(1, H, P, N2, device=device), data)]


def linear(dtype: torch.dtype, device: str) -> list[Work]:
    """The first projection of the layer, [2 D, d_model], on a CPU packed: bytes are dominated by the weight."""
    kind = torch.float32 if dtype == torch.float16 else dtype  # weights are float32 or bfloat16
    weight = _normal(2 * D, D_MODEL, device=device, dtype=kind)
    packed = pyseq.pack_linear(weight) if torch.device(device).type == "cpu" else weight

    def work(rows: int) -> Work:
        x = _normal(rows, D_MODEL, device=device, dtype=kind)

        def call() -> Any:
            with torch.no_grad():
                return pyseq.linear(x, packed)

        return Work(f"{rows} row{'s' * (rows > 1)}", call, tensor_bytes((x, weight, call())))

    return [work(rows) for rows in (1, 8, T)]


WORKLOADS: dict[str, Callable[[torch.dtype, str], list[Work]]] = {
    "causal_conv1d": causal_conv1d,
    "selective_scan": selective_scan,
    "ssd": ssd,
    "delta_rule": delta_rule,
    "gated_delta_rule": gated_delta_rule,
    "ema": ema,
    "rms_norm_gated": rms_norm_gated,
    "linear": linear,
    "mamba_step": mamba_step,
    "mamba2_step": mamba2_step,
}
