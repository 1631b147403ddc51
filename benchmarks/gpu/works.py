"""What is timed: shapes, pyseq's call, the peers' calls, the float64 value of both, and what bounds them.

Data are bfloat16, weights and states float32. Bytes count every input read once and every output written once; `ex2`
counts the results of the special-function unit: one per state or decay, two for softplus, one for silu. `flops` are
those of matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

import pyseq
from benchmarks.peers import (
    causal_conv1d_peer,
    compiled_loop,
    fla_peer,
    inputs,
    mamba_ssm_peer,
    torch_conv,
    torch_ema,
    torch_norm,
    torch_ssd,
)
from pyseq import reference

Call = Callable[[], Any]
Make = Callable[[Any], Call]
HALF = 2   # bytes of a bfloat16


@dataclass(frozen=True)
class Work:
    name: str
    op: str
    draw: Callable[..., Any]           # (*shape, dtype=, seed=, device=) -> inputs
    shape: tuple[int, ...]
    small: tuple[int, ...]             # of the same kind; everybody is compared with float64 there before being timed
    ours: Make
    exact: Make                        # the same values from pyseq.reference
    peers: dict[str, Make] = field(default_factory=dict)
    bytes: float = 0.0
    ex2: float = 0.0
    flops: float = 0.0
    goal: float | None = None          # seconds, on an H200
    targets: dict[str, float] = field(default_factory=dict)
    step: bool = False                 # one token: timed in a graph


# ---- calls: forward, or the gradients of every input -----------------------------------------------------------------


def _sequence(function: Callable[..., Any], names: str, grad: bool, **options: Any) -> Make:
    def make(x: Any) -> Call:
        tensors = [getattr(x, name).detach().clone().requires_grad_(grad) for name in names.split()]

        def call() -> Any:
            y = function(*tensors, **options)
            return torch.autograd.grad(y, tensors, x.dy) if grad else y

        return call

    return make


def _step(function: Callable[..., Any], names: str, **options: Any) -> Make:
    def make(x: Any) -> Call:
        tensors = [getattr(x, name) for name in names.split()]

        @torch.no_grad()
        def call() -> Any:
            return function(x.state, *tensors, **options)

        return call

    return make


def _scan(name: str, batch: int, time: int, dim: int, states: int, **more: Any) -> list[Work]:
    rows, shared = batch * time * dim, 2 * batch * time * states * HALF
    both = more.pop("goals", (None, None))
    names, options = "u dt A B C D z dt_bias", {"dt_softplus": True}
    forward_peers: dict[str, Make] = {"mamba-ssm": mamba_ssm_peer.selective_scan_forward}
    backward_peers: dict[str, Make] = {"mamba-ssm": mamba_ssm_peer.selective_scan_forward_backward}
    if more.pop("compiled", False):
        forward_peers["torch, compiled loop"] = compiled_loop.selective_scan_forward
    forward_bytes, forward_ex2 = 4 * rows * HALF + shared, rows * (states + 3)
    common: dict[str, Any] = {
        "op": "selective_scan", "draw": inputs.scan, "shape": (batch, time, dim, states), "small": (2, 70, 24, states),
        "targets": {"mamba-ssm": 2.0},
    }
    return [
        Work(f"selective_scan forward, {name}", **common, peers=forward_peers, bytes=forward_bytes, ex2=forward_ex2,
             ours=_sequence(pyseq.selective_scan, names, False, **options),
             exact=_sequence(reference.selective_scan, names, False, **options), goal=both[0]),
        Work(f"selective_scan forward+backward, {name}", **common, peers=backward_peers,
             bytes=forward_bytes + 7 * rows * HALF + 2 * shared, ex2=2 * forward_ex2 + rows * states,
             ours=_sequence(pyseq.selective_scan, names, True, **options),
             exact=_sequence(reference.selective_scan, names, True, **options), goal=both[1]),
    ]


def _delta(
    name: str, batch: int, time: int, heads: int, width: int = 64, both: float | None = None, small_time: int = 128
) -> list[Work]:
    """RWKV-7, K = V. In chunks of 16, multiply-adds per token and head: forward 3 K V and 6 x 16 K, backward 11 K V and
    22 x 16 K."""
    rows, names = batch * time * heads * width, "q k v a b g"
    forward, backward = rows * (3 * width + 6 * 16), rows * (11 * width + 22 * 16)
    works = []
    for grad, kind in ((False, "forward"), (True, "forward+backward")):
        works.append(Work(
            f"delta_rule (RWKV-7) {kind}, {name}", "delta_rule", inputs.delta, (batch, time, heads, width),
            (1, small_time, 2, width), _sequence(pyseq.delta_rule, names, grad),
            _sequence(reference.delta_rule, names, grad),
            {"fla": partial(fla_peer.delta_rule, grad=grad, form="triton")},
            bytes=rows * ((HALF * 6 + 4) + grad * (HALF * 11 + 8)), ex2=rows * (1 + grad),
            flops=2 * (forward + grad * backward), goal=both if grad else None, targets={"fla": 2.0},
        ))
    return works


def _gated_delta(name: str, batch: int, time: int, heads: int, width: int = 128, small_time: int = 128) -> list[Work]:
    """K = V. In chunks of 16, multiply-adds per token and head: forward 3 K V and 2 x 16 K, backward 8 K V and
    5 x 16 K."""
    rows, names = batch * time * heads * width, "q k v g beta"
    works = []
    for grad, kind in ((False, "forward"), (True, "forward+backward")):
        works.append(Work(
            f"gated_delta_rule {kind}, {name}", "gated_delta_rule", inputs.gated_delta, (batch, time, heads, width),
            (1, small_time, 2, width), _sequence(pyseq.gated_delta_rule, names, grad),
            _sequence(reference.gated_delta_rule, names, grad),
            {"fla": partial(fla_peer.gated_delta_rule, grad=grad, naive=False)},
            bytes=HALF * rows * (11 if grad else 4), ex2=rows // width * (1 + grad),
            flops=2 * rows * (3 * width + 2 * 16 + grad * (8 * width + 5 * 16)), targets={"fla": 1.0},
        ))
    return works


def _no_gate(function: Callable[..., Any]) -> Callable[..., Any]:
    """ssd or its step without z: dt_bias comes last."""

    def call(*tensors: Any, **options: Any) -> Any:
        return function(*tensors[:-1], dt_bias=tensors[-1], dt_softplus=True, **options)

    return call


def _ssd(
    name: str, batch: int, time: int, heads: int, goals: tuple[float | None, ...] = (None, None), small_time: int = 128
) -> list[Work]:
    """P 64, N 128, one group. Products in chunks of 64: forward 2 P N, Q/2 P and, shared by the heads, Q/2 N
    multiply-adds per token and head; backward 5 P N, Q P and 3/2 Q N."""
    width, states, chunk, names = 64, 128, 64, " ".join(torch_ssd.NAMES)
    rows, each, shared = batch * time * heads * width, batch * time * heads, batch * time * states
    forward = each * (2 * width * states + chunk / 2 * width) + shared * chunk / 2
    backward = each * (5 * width * states + chunk * width) + shared * chunk * 1.5
    works = []
    for grad, kind in ((False, "forward"), (True, "forward+backward")):
        peers: dict[str, Make] = {
            "mamba-ssm": partial(mamba_ssm_peer.ssd, grad=grad),
            "fla simple GLA": partial(fla_peer.ssd, grad=grad, naive=False),
            "torch, compiled chunks":
                partial(torch_ssd.ssd_forward_backward if grad else torch_ssd.ssd_forward, compiled=True),
        }
        works.append(Work(
            f"ssd {kind}, {name}", "ssd", inputs.ssd, (batch, time, heads, width, states), (1, small_time, 2, 64, 64),
            _sequence(_no_gate(pyseq.ssd), names, grad), _sequence(_no_gate(reference.ssd), names, grad), peers,
            bytes=HALF * ((5 if grad else 2) * rows + (3 if grad else 1) * (each + 2 * shared)),
            ex2=(6 if grad else 3) * each, flops=2 * (forward + backward if grad else forward), goal=goals[grad],
            targets={"mamba-ssm": 2.0},
        ))
    return works


def _conv(name: str, batch: int, time: int, dim: int, goals: tuple[float | None, ...] = (None, None)) -> list[Work]:
    rows, names, options = batch * time * dim, "x weight bias", {"activation": "silu"}
    works = []
    for grad, kind in ((False, "forward"), (True, "forward+backward")):
        peers: dict[str, Make] = {
            "causal-conv1d": partial(causal_conv1d_peer.causal_conv1d, grad=grad),
            "fla": partial(fla_peer.causal_conv1d, grad=grad),
            "torch conv1d": torch_conv.conv1d_forward_backward if grad else torch_conv.conv1d_forward,
            "torch, compiled": torch_conv.shift_add_forward_backward if grad else torch_conv.shift_add_forward,
        }
        works.append(Work(
            f"causal_conv1d {kind}, {name}", "causal_conv1d", inputs.conv, (batch, time, dim, 4), (2, 70, 24, 4),
            _sequence(pyseq.causal_conv1d, names, grad, **options),
            _sequence(reference.causal_conv1d, names, grad, **options), peers,
            bytes=(5 if grad else 2) * rows * HALF, ex2=(2 if grad else 1) * rows, goal=goals[grad],
        ))
    return works


def _ema(name: str, batch: int, time: int, dim: int, goals: tuple[float | None, ...] = (None, None)) -> list[Work]:
    rows, works = batch * time * dim, []
    for grad, kind in ((False, "forward"), (True, "forward+backward")):
        peers: dict[str, Make] = {
            "mamba-ssm, as H-Net": partial(mamba_ssm_peer.ema, grad=grad),
            "torch, compiled loop": partial(torch_ema.ema, form="compiled", grad=grad),
        }
        kept = 2 * 4 * rows / 16 if grad else 0   # y of every 16th token, written and read
        works.append(Work(
            f"ema {kind}, {name}", "ema", inputs.ema, (batch, time, dim), (2, 70, 64),
            _sequence(pyseq.ema, "x p", grad), _sequence(reference.ema, "x p", grad), peers,
            bytes=(5 if grad else 2) * rows * HALF + kept, goal=goals[grad], targets={"mamba-ssm, as H-Net": 2.0},
        ))
    return works


def _norm(name: str, batch: int, time: int, dim: int, norm_before_gate: bool) -> list[Work]:
    rows, names, options = batch * time * dim, "x weight z", {"norm_before_gate": norm_before_gate}
    first = "norm first" if norm_before_gate else "gate first"
    works = []
    for grad, kind in ((False, "forward"), (True, "forward+backward")):
        order: dict[str, Any] = {"norm_before_gate": norm_before_gate, "grad": grad}
        peers: dict[str, Make] = {
            "mamba-ssm": partial(mamba_ssm_peer.rms_norm_gated, **order),
            "torch": partial(torch_norm.rms_norm_gated, compiled=False, **order),
            "torch, compiled": partial(torch_norm.rms_norm_gated, compiled=True, **order),
        }
        if norm_before_gate:
            peers["fla"] = partial(fla_peer.rms_norm_gated, grad=grad)
        works.append(Work(
            f"rms_norm_gated {kind}, {first}, {name}", "rms_norm_gated", inputs.norm, (batch, time, dim), (2, 9, 96),
            _sequence(pyseq.rms_norm_gated, names, grad, **options),
            _sequence(reference.rms_norm_gated, names, grad, **options), peers,
            bytes=(8 if grad else 3) * rows * HALF, ex2=(2 if grad else 1) * rows,
        ))
    return works


def _steps(batch: int, dim: int, states: int) -> list[Work]:
    rows, names, options = batch * dim, "u dt A B C D z dt_bias", {"dt_softplus": True}
    scan = Work(
        f"selective_scan_step, B{batch} D{dim} N{states}", "selective_scan", inputs.scan_step, (batch, dim, states),
        (2, 24, states), _step(pyseq.selective_scan_step, names, **options),
        _step(reference.selective_scan_step, names, **options),
        {"mamba-ssm": mamba_ssm_peer.selective_scan_step,
         "torch": _step(reference.selective_scan_step, names, **options)},
        bytes=8 * rows * states + 4 * rows * HALF + 4 * dim * (states + 2), ex2=rows * (states + 3), step=True,
    )
    taps = {"activation": "silu"}
    conv = Work(
        f"causal_conv1d_step, B{batch} D{dim}", "causal_conv1d", inputs.conv_step, (batch, dim, 4), (2, 24, 4),
        _step(pyseq.causal_conv1d_step, "x weight bias", **taps),
        _step(reference.causal_conv1d_step, "x weight bias", **taps),
        {"causal-conv1d": causal_conv1d_peer.causal_conv1d_step, "fla": fla_peer.causal_conv1d_step},
        bytes=2 * rows * 3 * 4 + 2 * rows * HALF + 4 * dim * 5, ex2=rows, step=True,
    )
    rank = max(1, dim // 32)
    average = Work(
        f"ema_step, B{batch} D{dim}", "ema", inputs.ema_step, (batch, dim), (2, 24), _step(pyseq.ema_step, "x p"),
        _step(reference.ema_step, "x p"), bytes=2 * rows * 4 + 2 * rows * HALF, step=True,
    )
    layer = Work(
        f"mamba_step, B{batch} D{dim} N{states}", "mamba_step", inputs.mamba_step, (batch, dim, states),
        (2, 64, states), _whole(pyseq.mamba_step), _whole(reference.mamba_step),
        {"mamba-ssm": mamba_ssm_peer.mamba_step},
        bytes=8 * rows * (states + 3) + 3 * rows * HALF + (2 * rank + 2 * states) * dim * HALF + 4 * dim * (states + 7),
        ex2=rows * (states + 4), step=True,
    )
    return [scan, conv, average, layer]


def _half_state(*shape: int, **more: Any) -> inputs.SsdStep:
    x = inputs.ssd_step(*shape, **more)
    return replace(x, state=x.state.to(torch.bfloat16))


def _ssd_steps(batch: int, heads: int, width: int = 64, states: int = 128) -> list[Work]:
    """The state float32, and bfloat16, which halves what moves."""
    elements, names = batch * heads * width * states, " ".join(torch_ssd.NAMES)
    works = []
    for kind, draw, size in (("float32", inputs.ssd_step, 4), ("bfloat16", _half_state, HALF)):
        works.append(Work(
            f"ssd_step, B{batch} H{heads} P{width} N{states}, {kind} state", "ssd", draw, (batch, heads, width, states),
            (2, 3, 16, 32), _step(_no_gate(pyseq.ssd_step), names), _step(_no_gate(reference.ssd_step), names),
            {"mamba-ssm": mamba_ssm_peer.ssd_step}, bytes=2 * size * elements + 2 * HALF * batch * heads * width,
            ex2=3 * batch * heads, step=True,
        ))
    return works


def _mamba2_steps(batch: int, heads: int, width: int = 64, states: int = 128) -> list[Work]:
    inner, channels = heads * width, heads * width + 2 * states
    return [Work(
        f"mamba2_step, B{batch} H{heads} P{width} N{states}", "mamba2_step", inputs.mamba2_step,
        (batch, heads, width, states), (2, 3, 16, 32), _whole(pyseq.mamba2_step), _whole(reference.mamba2_step),
        {"mamba-ssm": mamba_ssm_peer.mamba2_step},
        bytes=8 * batch * (inner * states + 3 * channels) + batch * (2 * inner + channels) * HALF + 16 * channels,
        ex2=batch * (2 * channels + inner + 3 * heads), step=True,
    )]


def _whole(function: Callable[..., Any]) -> Make:
    """A step that takes every field of its inputs."""

    def make(x: Any) -> Call:
        return torch.no_grad()(partial(function, **vars(x)))

    return make


def standard() -> list[Work]:
    """The workloads that the goals are set for, then decoding, then small batches."""
    works = [
        *_scan("B8 T2048 D4096 N16", 8, 2048, 4096, 16, goals=(0.35e-3, 1.55e-3), compiled=True),
        *_ssd("B8 T4096 H64 P64 N128", 8, 4096, 64, goals=(0.30e-3, 1.10e-3)),
        *_delta("B8 T4096 H64 K64 V64", 8, 4096, 64, both=2.3e-3),
        *_gated_delta("B8 T4096 H16 K128 V128", 8, 4096, 16),
        *_conv("B8 T4096 D8192 W4", 8, 4096, 8192, goals=(0.28e-3, None)),
        *_ema("B8 T4096 D1024", 8, 4096, 1024, goals=(0.04e-3, None)),
        *_norm("B8 T4096 D4096", 8, 4096, 4096, False),
        *_norm("B8 T4096 D4096", 8, 4096, 4096, True),
    ]
    for batch in (1, 8, 64, 256):
        works += _steps(batch, 5120, 16) + _ssd_steps(batch, 80) + _mamba2_steps(batch, 80)
    for time in (2048, 8192, 32768, 131072):
        works += _scan(f"B1 T{time} D1536 N16", 1, time, 1536, 16)
    for time in (2048, 131072):
        works += _ssd(f"B1 T{time} H24 P64 N128", 1, time, 24)
    return works + _conv("B1 T2048 D1536 W4", 1, 2048, 1536) + _norm("B1 T2048 D1536", 1, 2048, 1536, False)


def tiny() -> list[Work]:
    """One of each kind, at the size of a dry run."""
    return [
        *_scan("tiny", 1, 6, 8, 4), *_ssd("tiny", 1, 3, 1, small_time=5), *_conv("tiny", 1, 6, 8),
        *_ema("tiny", 1, 6, 32), *_delta("tiny", 1, 3, 1, 16, small_time=5), *_gated_delta("tiny", 1, 3, 1, 16, 5),
        *_norm("tiny", 1, 3, 8, True), *_steps(2, 8, 4), *_ssd_steps(2, 2, 16, 32),
        *_mamba2_steps(2, 2, 16, 32),
    ]
