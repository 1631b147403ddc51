"""Running an op on a backend and judging its error against float64: used by the tests and by `pyseq verify`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from . import _library, reference
from ._library import Op
from .samples import cast

# The relative error of one rounding to a dtype: half a unit in the last place.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

# How many float32 roundings of the largest value may add up before the store. Errors of n roundings grow like sqrt(n)
# (Higham and Mary, 2019): 32 covers the sums over state, width and time of an output, 128 those over batch and time of
# the gradient of a weight.
ROUNDINGS = {"output": 32, "gradient": 128}

# An op that multiplies matrices of 16-bit data rounds what it computed on the way, decays times products and states,
# to that type before it multiplies again, as every implementation for matrix units does. Per element that may be as
# much as one rounding of the largest value; over an output, so much that the root mean square of all errors is at most
# 1.3 times that of the final rounding alone. The average of fewer elements than MANY says little. States are not
# computed from rounded operands and get no allowance.
PRODUCTS_RMS = 1.3
MANY = 256

DTYPES = tuple(ROUNDING)


def backends(op: Op) -> list[str]:
    """The backends of `op` that can run here: "cpu", "simt" if the emulator was built, "cuda" if there is a GPU."""
    return [b for b in op.backends if b != "cuda" or torch.cuda.is_available()]


@contextlib.contextmanager
def on(backend: str) -> Iterator[str]:
    """Calls inside run on `backend`; gives the device for their tensors. On "simt" something must be launched."""
    if backend != "simt":
        yield "cuda" if backend == "cuda" else "cpu"
        return
    before = sum(_library._simt.launches().values())
    with _library.use_namespace("pyseq_simt"):
        yield "cpu"
    if sum(_library._simt.launches().values()) == before:
        raise AssertionError("nothing was launched on the emulator: the call ran somewhere else")


def as_tuple(value: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of an op's result, states that are tuples flattened."""
    if isinstance(value, torch.Tensor):
        return (value,)
    return tuple(t for v in value for t in as_tuple(v))


def differentiable(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The floating-point tensors among the arguments, tuples flattened under names like "state.0"."""
    found: dict[str, torch.Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, tuple) and all(isinstance(v, torch.Tensor) for v in value):
            found |= {f"{name}.{i}": v for i, v in enumerate(value)}
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            found[name] = value
    return found


def prepare(arguments: dict[str, Any], device: str, *, requires_grad: bool) -> dict[str, Any]:
    """The arguments on `device` as fresh leaves."""

    def one(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(one(v) for v in value)
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach().to(device)
        return value.requires_grad_(requires_grad and value.is_floating_point())

    return {name: one(value) for name, value in arguments.items()}


def loss(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A weighted sum of all outputs in float64. The weights, multiples of 1/8 within 1, are exact in every dtype."""
    total = torch.zeros((), dtype=torch.float64)
    for k, y in enumerate(outputs):
        weights = ((7 * torch.arange(y.numel()) + k) % 17 - 8).to(torch.float64).reshape(y.shape) / 8
        total = total + (y.double().cpu() * weights).sum()
    return total


def gradients(
    function: Any, arguments: dict[str, Any]
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Outputs and, by argument name, the gradients of `loss` (zeros where an argument does not take part)."""
    outputs = as_tuple(function(**arguments))
    leaves = differentiable(arguments)
    grads = torch.autograd.grad(loss(outputs), list(leaves.values()), allow_unused=True)
    named = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    return outputs, named


def reference_of(op: Op) -> Any:
    return getattr(reference, op.name)


def expected(op: Op, arguments: dict[str, Any]) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """The reference's outputs and gradients in float64, on the values that `arguments` hold after rounding."""
    wide = prepare(cast(prepare(arguments, "cpu", requires_grad=False), torch.float64, ()), "cpu", requires_grad=True)
    return gradients(reference_of(op), wide)


def updated(function: Any, op: Op, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """For an op that is only a step: y and the tensors that it updates, from copies of those in `arguments`."""
    arguments = arguments | {name: arguments[name].clone() for name in op.updates}
    with torch.no_grad():
        y = function(**arguments)
    return y, *(arguments[name] for name in op.updates)


def expected_update(op: Op, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """The same of the reference in float64, on the values that `arguments` hold after rounding."""
    wide = prepare(cast(prepare(arguments, "cpu", requires_grad=False), torch.float64, ()), "cpu", requires_grad=False)
    return updated(reference_of(op), op, wide)


def error(
    actual: torch.Tensor, exact: torch.Tensor, kind: str = "output", products: torch.dtype | None = None
) -> float:
    """The largest error in units of what is allowed: at most 1 passes. NaN or infinity where `exact` is finite: inf.

    Allowed is one rounding to the dtype of `actual`, plus ROUNDINGS[kind] float32 roundings of the largest value.
    `products` is the type that operands were rounded to on the way, if they were.
    """
    if actual.shape != exact.shape:
        raise AssertionError(f"shape {list(actual.shape)}, expected {list(exact.shape)}")
    if actual.numel() == 0:
        return 0.0
    exact = exact.detach().double().cpu()
    off = (actual.detach().double().cpu() - exact).abs()
    rounding = 1.01 * ROUNDING.get(actual.dtype, 0.0) * exact.abs()
    allowed = rounding + ROUNDINGS[kind] * ROUNDING[torch.float32] * exact.abs().max()
    worst = 0.0
    if products is not None and (kind == "gradient" or actual.dtype == products):
        allowed = allowed + ROUNDING[products] * exact.abs().max()
        if actual.dtype == products and actual.numel() >= MANY:
            alone = (exact.to(products).double() - exact).square().mean().sqrt()
            worst = float(off.square().mean().sqrt() / (PRODUCTS_RMS * alone).clamp_min(1e-300))
    return max(worst, float((off / allowed.clamp_min(1e-300)).nan_to_num(nan=float("inf")).max()))


def products_of(op: Op, arguments: dict[str, Any]) -> torch.dtype | None:
    """The type that `op` rounds operands to for these arguments: where all that it multiplies has that type."""
    types = {arguments[n].dtype for n in op.operands if arguments.get(n) is not None}
    return op.products if types == {op.products} and not arguments.get("exact") else None


def products_in(gradient: str, products: torch.dtype | None) -> torch.dtype | None:
    """The same for one gradient: a state's is a state, and not computed from rounded operands."""
    return None if gradient.split(".")[0].endswith("state") else products


def assert_close(
    actual: torch.Tensor, exact: torch.Tensor, what: str, kind: str = "output", products: torch.dtype | None = None
) -> None:
    worst = error(actual, exact, kind, products)
    assert worst <= 1, f"{what}: the error is {worst:.3g} times what rounding explains ({actual.dtype})"
