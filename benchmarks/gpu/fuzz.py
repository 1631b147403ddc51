"""Random shapes, options, dtypes and strides of every op against float64, twice each: errors and equal bits.

    python -m benchmarks.gpu.fuzz selective_scan 17      one draw again, as a failing report names it
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from pyseq import testing
from pyseq._library import REGISTRY, Op
from pyseq.samples import cast, samples

from .device import Cuda, Device, Dry, ops

Arguments = dict[str, Any]


def _cuts(rng: random.Random, time_: int) -> list[int]:
    """cu_seqlens of up to five sequences, some of them empty."""
    return [0, *sorted(rng.choice((0, time_, rng.randint(0, time_))) for _ in range(rng.randint(0, 4))), time_]


def _length(rng: random.Random, longest: int) -> int:
    """Around the borders of tiles, or anywhere."""
    border = rng.choice((1, 2, 8, 16, 32, 64, 128)) + rng.randint(-1, 1)
    return min(longest, rng.choice((border, rng.randint(0, longest), rng.randint(1, 8))))


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def selective_scan(rng: random.Random, g: torch.Generator, most: int) -> Arguments:
    packed = rng.random() < 0.3
    batch, time_ = 1 if packed else rng.randint(1, 3), _length(rng, most)
    groups, dim, states = rng.choice((0, 0, 1, 2, 3)), _length(rng, most) + 1, rng.choice((1, 2, 3, 8, 16, 16, 17, 40))
    dim *= max(1, groups)
    shared = (batch, time_, groups, states) if groups else (batch, time_, states)
    softplus = rng.random() < 0.7
    cuts = _cuts(rng, time_)
    dt, bias = _normal(g, batch, time_, dim), _normal(g, dim)
    arguments: Arguments = {
        "u": _normal(g, batch, time_, dim), "dt": dt if softplus else 0.1 + 0.1 * dt.abs(),
        "A": -torch.arange(1, states + 1, dtype=torch.float64) * (1 + 0.1 * _normal(g, dim, states)),
        "B": _normal(g, *shared), "C": _normal(g, *shared), "dt_softplus": softplus,
        "return_state": rng.random() < 0.5,
    }
    optional = {
        "D": _normal(g, dim), "z": _normal(g, batch, time_, dim),
        "dt_bias": bias - 2 if softplus else 0.1 * bias.abs(),   # a negative dt would let the state grow
        "state": _normal(g, len(cuts) - 1 if packed else batch, dim, states),
    }
    arguments |= {name: value for name, value in optional.items() if rng.random() < 0.5}
    return arguments | ({"cu_seqlens": torch.tensor(cuts, dtype=torch.int32)} if packed else {})


def ssd(rng: random.Random, g: torch.Generator, most: int) -> Arguments:
    packed, softplus = rng.random() < 0.3, rng.random() < 0.7
    batch, groups = 1 if packed else rng.randint(1, 2), rng.choice((1, 1, 2, 3))
    heads, width, states = groups * rng.randint(1, 2), _width(rng, most), _width(rng, 2 * most)
    time_ = _length(rng, min(most, (1 << 21) // (batch * heads * width * states)))   # the reference keeps every state
    dt, bias, cuts = _normal(g, batch, time_, heads), _normal(g, heads), _cuts(rng, time_)
    arguments: Arguments = {
        "x": _normal(g, batch, time_, heads, width), "dt": dt if softplus else 0.1 + 0.1 * dt.abs(),
        "A": -torch.linspace(0.3, 4, heads, dtype=torch.float64), "B": _normal(g, batch, time_, groups, states),
        "C": _normal(g, batch, time_, groups, states), "dt_softplus": softplus, "return_state": rng.random() < 0.5,
        "exact": rng.random() < 0.2, "chunk_size": rng.choice((None, None, 16, 48, 256)),
        "dt_limit": (0.05, 0.3) if rng.random() < 0.2 else (0.0, math.inf),
    }
    optional = {
        "D": _normal(g, heads, width) if rng.random() < 0.3 else _normal(g, heads),
        "z": _normal(g, batch, time_, heads, width), "dt_bias": bias - 2 if softplus else 0.1 * bias.abs(),
        "state": _normal(g, len(cuts) - 1 if packed else batch, heads, width, states),
    }
    arguments |= {name: value for name, value in optional.items() if rng.random() < 0.5}
    return arguments | ({"cu_seqlens": torch.tensor(cuts, dtype=torch.int32)} if packed else {})


def delta_rule(rng: random.Random, g: torch.Generator, most: int) -> Arguments:
    packed, correct = rng.random() < 0.3, rng.random() < 0.7
    batch, heads = 1 if packed else rng.randint(1, 2), rng.randint(1, 3)
    keys, values = _width(rng, most), _width(rng, most)
    time_ = _length(rng, min(most, (1 << 21) // (batch * heads * keys * values)))   # the reference keeps every state
    rows, cuts = (batch, time_, heads), _cuts(rng, time_)
    unit = torch.nn.functional.normalize(_normal(g, *rows, keys), dim=-1)
    decay = -rng.choice((0.1, 0.6, 20.0)) * _normal(g, *rows, keys).sigmoid()
    arguments: Arguments = {
        "q": _normal(g, *rows, keys), "k": _normal(g, *rows, keys) * keys**-0.5, "v": _normal(g, *rows, values),
        "a": -unit if correct else None, "b": unit * _normal(g, *rows, keys).sigmoid() if correct else None,
        "g": rng.choice((decay, decay, decay[..., 0], None)), "return_state": rng.random() < 0.5,
        "exact": rng.random() < 0.2, "scale": rng.choice((1.0, 0.3)),
    }
    if rng.random() < 0.5:
        arguments["state"] = _normal(g, len(cuts) - 1 if packed else batch, heads, keys, values)
    return arguments | ({"cu_seqlens": torch.tensor(cuts, dtype=torch.int32)} if packed else {})


def gated_delta_rule(rng: random.Random, g: torch.Generator, most: int) -> Arguments:
    packed = rng.random() < 0.3
    batch, heads = 1 if packed else rng.randint(1, 2), rng.randint(1, 2)
    keys, values = _width(rng, most), _width(rng, most)
    shared = heads * rng.randint(1, 3)
    time_ = _length(rng, min(most, (1 << 21) // (batch * shared * keys * values)))
    rows, cuts = (batch, time_, shared), _cuts(rng, time_)
    decay = -rng.choice((0.1, 1.0, 20.0)) * _normal(g, *rows, keys).sigmoid()
    q, k = (torch.nn.functional.normalize(_normal(g, batch, time_, heads, keys), dim=-1) for _ in range(2))
    arguments: Arguments = {
        "q": q, "k": k, "v": _normal(g, *rows, values), "g": rng.choice((decay, decay[..., 0], decay[..., 0], None)),
        "beta": rng.choice((1.0, 2.0)) * _normal(g, *rows).sigmoid(), "return_state": rng.random() < 0.5,
        "exact": rng.random() < 0.2,
    }
    if rng.random() < 0.5:
        arguments["state"] = _normal(g, len(cuts) - 1 if packed else batch, shared, keys, values)
    return arguments | ({"cu_seqlens": torch.tensor(cuts, dtype=torch.int32)} if packed else {})


def _width(rng: random.Random, most: int) -> int:
    """Those of the models, or any."""
    return min(rng.choice((16, 64, 64, 128, _length(rng, most) + 1)), most)


def causal_conv1d(rng: random.Random, g: torch.Generator, most: int) -> Arguments:
    packed = rng.random() < 0.3
    batch, time_ = 1 if packed else rng.randint(1, 3), _length(rng, most)
    dim, width, cuts = _length(rng, 2 * most) + 1, rng.choice((1, 2, 3, 4, 4, 4, 5, 9)), _cuts(rng, time_)
    optional = {
        "bias": _normal(g, dim), "state": _normal(g, len(cuts) - 1 if packed else batch, dim, width - 1),
    }
    arguments: Arguments = {
        "x": _normal(g, batch, time_, dim), "weight": _normal(g, dim, width),
        "activation": rng.choice((None, "silu")), "return_state": rng.random() < 0.5,
    } | {name: value for name, value in optional.items() if rng.random() < 0.5}
    return arguments | ({"cu_seqlens": torch.tensor(cuts, dtype=torch.int64)} if packed else {})


def ema(rng: random.Random, g: torch.Generator, most: int) -> Arguments:
    packed = rng.random() < 0.3
    batch, time_ = 1 if packed else rng.randint(1, 3), _length(rng, 4 * most)
    dim, cuts = _length(rng, 2 * most) + 1, _cuts(rng, time_)
    p = (3 * _normal(g, batch, time_) - 1).sigmoid()
    arguments: Arguments = {
        "x": _normal(g, batch, time_, dim), "p": p.clamp(1e-4, 1 - 1e-4), "return_state": rng.random() < 0.5
    }
    if rng.random() < 0.5:
        arguments["state"] = _normal(g, len(cuts) - 1 if packed else batch, dim)
    return arguments | ({"cu_seqlens": torch.tensor(cuts, dtype=torch.int32)} if packed else {})


def rms_norm_gated(rng: random.Random, g: torch.Generator, most: int) -> Arguments:
    groups, size, rows = rng.choice((1, 1, 2, 5)), rng.randint(2, 6 * most), rng.randint(0, most)
    shape = (rows, groups * size)
    optional = {"z": _normal(g, *shape), "residual": _normal(g, *shape)}
    return {
        "x": _normal(g, *shape), "weight": 1 + 0.1 * _normal(g, groups * size), "eps": 1e-3,
        "group_size": None if groups == 1 else size, "norm_before_gate": rng.random() < 0.5,
    } | {name: value for name, value in optional.items() if rng.random() < 0.5}


def mamba_step(rng: random.Random, g: torch.Generator, most: int) -> Arguments:
    batch, dim, rank = rng.randint(1, 9), _length(rng, most) + 1, _length(rng, 70) + 1
    states, width = rng.choice((1, 2, 8, 16, 33)), rng.choice((1, 2, 4, 4, 6))
    return {
        "conv_state": _normal(g, batch, dim, width - 1), "state": _normal(g, batch, dim, states),
        "x": _normal(g, batch, dim), "z": _normal(g, batch, dim), "conv_weight": _normal(g, dim, width),
        "conv_bias": _normal(g, dim) if rng.random() < 0.7 else None,
        "x_proj_weight": _normal(g, rank + 2 * states, dim) / dim**0.5,
        "dt_proj_weight": _normal(g, dim, rank) / rank**0.5, "dt_bias": _normal(g, dim) - 2,
        "A": -torch.arange(1, states + 1, dtype=torch.float64) * (1 + 0.1 * _normal(g, dim, states).abs()),
        "D": _normal(g, dim), "rms_eps": 1e-3 if rng.random() < 0.3 else None,
    }


def mamba2_step(rng: random.Random, g: torch.Generator, most: int) -> Arguments:
    groups, batch, taps = rng.choice((1, 1, 2, 3)), rng.randint(1, 9), rng.choice((1, 2, 4, 4, 6))
    heads, width, states = groups * rng.randint(1, 3), _width(rng, most), _width(rng, 2 * most)
    inner, channels = heads * width, heads * width + 2 * groups * states
    return {
        "conv_state": _normal(g, batch, channels, taps - 1), "state": _normal(g, batch, heads, width, states),
        "z": _normal(g, batch, inner) if rng.random() < 0.9 else None, "xBC": _normal(g, batch, channels),
        "dt": _normal(g, batch, heads), "conv_weight": _normal(g, channels, taps),
        "conv_bias": _normal(g, channels) if rng.random() < 0.7 else None,
        "A": -torch.linspace(0.3, 4, heads, dtype=torch.float64),
        "D": _normal(g, heads, width) if rng.random() < 0.3 else _normal(g, heads), "dt_bias": _normal(g, heads) - 2,
        "norm_weight": 1 + 0.1 * _normal(g, inner) if rng.random() < 0.7 else None, "eps": 0.5,
        "group_size": rng.choice((None, inner // groups)), "norm_before_gate": rng.random() < 0.5,
        "dt_limit": (0.05, 0.3) if rng.random() < 0.2 else (0.0, math.inf),
    }


DRAWS: dict[str, Callable[[random.Random, torch.Generator, int], Arguments]] = {
    "selective_scan": selective_scan, "ssd": ssd, "causal_conv1d": causal_conv1d, "rms_norm_gated": rms_norm_gated,
    "mamba_step": mamba_step, "mamba2_step": mamba2_step, "ema": ema,
    "delta_rule": delta_rule, "gated_delta_rule": gated_delta_rule,
}


def draw(op: Op, seed: int, most: int) -> Arguments:
    """Arguments on the CPU, rounded to dtypes; every third draw mixes them, every third lies strided in memory."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    if op.name in DRAWS:
        arguments = DRAWS[op.name](rng, generator, most)
    else:
        known = samples(op.name)
        arguments = known[seed % len(known)].draw(seed)
    arguments = cast(arguments, rng.choice(testing.DTYPES), op.float32)
    arguments |= {name: arguments[name].float() for name in op.updates}
    mixed, strided = rng.random() < 0.3, rng.random() < 0.3
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name not in ("state", *op.updates):
            value = value.to(rng.choice(testing.DTYPES)) if mixed else value
            arguments[name] = _slice(value) if strided else value
    return arguments


def _slice(t: torch.Tensor) -> torch.Tensor:
    """The same values as a slice of something wider, with NaN around them."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), float("nan"), dtype=t.dtype)
    wide[..., 3 : 3 + t.shape[-1]] = t
    return wide[..., 3 : 3 + t.shape[-1]]


def examine(op: Op, arguments: Arguments, device: Device) -> tuple[float, bool]:
    """The largest error of outputs and gradients, in units of what is allowed, and whether two runs have equal bits."""
    if op.updates:   # only a step: no gradients
        exact, exact_grads = testing.expected_update(op, arguments), dict[str, torch.Tensor]()
    else:
        exact, exact_grads = testing.expected(op, arguments)
    runs = []
    for _ in range(2):
        with testing.on(device.backend) as place:
            given = testing.prepare(arguments, place, requires_grad=not op.updates)
            if op.updates:
                outputs, grads = testing.updated(op.function, op, given), dict[str, torch.Tensor]()
            else:
                outputs, grads = testing.gradients(op.function, given)
        runs.append((*outputs, *grads.values()))
    products = testing.products_of(op, arguments)
    errors = [testing.error(y, e, "output", products) for y, e in zip(outputs, exact, strict=True)]
    errors += [
        testing.error(grad, exact_grads[name], "gradient", testing.products_in(name, products))
        for name, grad in grads.items()
    ]
    return max(errors, default=0.0), all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def empty(arguments: Arguments) -> bool:
    """Nothing to launch for: some data argument holds no element."""
    data = arguments.get("x", arguments.get("u"))
    return isinstance(data, torch.Tensor) and data.numel() == 0


def run(device: Device, seconds: float, draws: int, most: int) -> dict[str, Any]:
    """Draw after draw, the ops in turns, until there are enough or the time is over."""
    deadline, worst, failures, done = time.monotonic() + seconds, dict[str, float](), [], 0
    there = ops(device)
    for seed in range(draws):
        if time.monotonic() > deadline:
            break
        op = there[seed % len(there)]
        arguments = draw(op, seed, most)
        if device.backend == "simt" and empty(arguments):
            continue   # on the emulator testing.on() asks for a launch
        try:
            error, equal = examine(op, arguments, device)
        except Exception as problem:
            failures.append(f"{op.name} {seed}: {type(problem).__name__}: {str(problem)[:300]}")
            if device.faulted():
                break   # nothing more can run in this process
            continue
        done += 1
        worst[op.name] = max(worst.get(op.name, 0.0), error)
        if not error <= 1:
            failures.append(f"{op.name} {seed}: the error is {error:.3g} times what rounding explains")
        if not equal:
            failures.append(f"{op.name} {seed}: two runs differ in bits")
    return {
        "ok": not failures and done > 0, "draws": done, "of": draws, "worst error": worst, "failures": failures[:50],
        "why": "; ".join(failures[:3]),
        "summary": f"{done} draws of {draws}, worst error {max(worst.values(), default=0.0):.2f} of what is allowed"
                   + (f", {len(failures)} failures: {failures[0]}" if failures else ""),
    }


def main() -> int:
    name, seed = sys.argv[1], int(sys.argv[2])
    op, device = REGISTRY[name], Cuda() if torch.cuda.is_available() else Dry()
    arguments = draw(op, seed, LONGEST)
    for key, value in arguments.items():
        print(key, (value.dtype, list(value.shape), value.stride()) if isinstance(value, torch.Tensor) else value)
    print(*examine(op, arguments, device))
    return 0


LONGEST = 160   # steps and channels of a draw, about

if __name__ == "__main__":
    sys.exit(main())
