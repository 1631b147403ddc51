"""What a framework asks of a kernel beside its numbers: graphs, streams, devices, and offsets past 2^31.

    python -m benchmarks.gpu.runtime smallest      every kernel once at its smallest shapes: compute-sanitizer runs this
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch

import pyseq
from pyseq import testing
from pyseq._library import REGISTRY, Op
from pyseq.samples import Sample, cast, samples

from .device import Cuda, Device, Dry, ops, tensors
from .record import NotHere

# Of pyseq.samples: every kernel, few shapes.
CHOSEN = {"plain", "all", "packed", "gated", "residual_gated", "wide_gated", "wide_long"}


def chosen(op: Op) -> list[Sample]:
    found = [s for s in samples(op.name) if s.name in CHOSEN]
    return found or samples(op.name)[:1]


def _arguments(
    op: Op, sample: Sample, device: str, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    return testing.prepare(cast(sample.draw(seed), dtype, op.float32), device, requires_grad=False)


def _forward_backward(op: Op, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Outputs and gradients, without anything that waits for the device; of an op that only steps, what it updates."""
    if op.updates:
        return testing.updated(op.function, op, arguments)
    leaves = {n: v.detach().requires_grad_() if v.is_floating_point() else v for n, v in _tensors_of(arguments).items()}
    outputs = testing.as_tuple(op.function(**(arguments | leaves)))
    wanted = [v for v in leaves.values() if v.requires_grad]
    grads = torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs], allow_unused=True)
    return (*outputs, *(g for g in grads if g is not None))


def _tensors_of(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {n: v for n, v in arguments.items() if isinstance(v, torch.Tensor)}


def _step(op: Op, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """The first token through the step, from the state that an empty sequence leaves."""
    assert op.step is not None
    given = {n: arguments[n] for n in op.time if arguments.get(n) is not None}
    start = arguments | {n: v[:, :0] for n, v in given.items()} | {"return_state": True}
    state = op.function(**start)[1]
    options = {n: v for n, v in arguments.items() if n not in ("state", "return_state")}
    return op.step(state, **options | {n: v[:, 0] for n, v in given.items()}), state


def _steps(op: Op, sample: Sample) -> bool:
    return op.step is not None and "cu_seqlens" not in sample.draw()


def graphs(device: Device) -> dict[str, Any]:
    """Forward with backward, and step, captured in graphs: replays on other inputs give the bits of plain calls."""
    count = 0
    for op in ops(device):
        for sample in chosen(op):
            for call in (_forward_backward, *((_step,) if _steps(op, sample) else ())):
                with testing.on(device.backend) as place, torch.set_grad_enabled(call is _forward_backward):
                    fixed, others = _arguments(op, sample, place), _arguments(op, sample, place, seed=1)
                    replay, result = device.capture(partial(call, op, fixed))
                    for name, tensor in _tensors_of(fixed).items():
                        tensor.copy_(others[name])
                    replay()
                    device.synchronize()
                    _assert_equal(result, call(op, others), f"{sample} {call.__name__} replayed")
                count += 1
    return {"captured": count, "summary": f"{count} graphs"}


def streams(device: Device) -> dict[str, Any]:
    """On a second stream, behind slow work that fills its inputs: a kernel on another stream would read them early."""
    count = 0
    for op in ops(device):
        for sample in chosen(op):
            with testing.on(device.backend) as place:
                expected = _forward_backward(op, _arguments(op, sample, place))
                filled = _arguments(op, sample, place)
                late = {n: v.clone() for n, v in _tensors_of(filled).items() if v.is_floating_point()}
                for name in late:
                    filled[name].fill_(float("nan"))
                device.synchronize()
                with device.side_stream():
                    device.delay(0.02)
                    for name, value in late.items():
                        filled[name].copy_(value)
                    result = _forward_backward(op, filled)
                device.synchronize()
                _assert_equal(result, expected, f"{sample} on a second stream")
            count += 1
    return {"calls": count, "summary": f"{count} calls on a second stream"}


def second_device(device: Device) -> dict[str, Any]:
    """Tensors on the second GPU while the first is the current one."""
    if device.dry or torch.cuda.device_count() < 2:
        raise NotHere("this machine has one GPU" if not device.dry else "no GPU here")
    for op in ops(device):
        for sample in chosen(op):
            first = _forward_backward(op, _arguments(op, sample, "cuda:0"))
            second = _forward_backward(op, _arguments(op, sample, "cuda:1"))
            assert all(t.device.index == 1 for t in second), f"{sample}: a result is not on the inputs' device"
            if torch.cuda.get_device_capability(0) == torch.cuda.get_device_capability(1):
                _assert_equal([t.to("cuda:0") for t in second], first, f"{sample} on the second device")
    return {"devices": torch.cuda.device_count()}


def big_offsets(device: Device) -> dict[str, Any]:
    """More than 2^31 elements: the last tokens of one long sequence equal their own call from the state before them,
    and so do their gradients; the last row of a large batch equals that row alone."""
    dim, tail, rows = (24, 8, 16) if device.dry else (512, 64, 64)
    time = 16 * rows if device.dry else 2**31 // dim + 4096
    if not device.dry and device.free_bytes() < 60 * 2**30:
        raise NotHere("needs 60 GiB of free memory")
    there = {op.name for op in ops(device)}
    done = []
    with testing.on(device.backend) as place:
        x = torch.randn(1, time, dim, device=place).to(torch.bfloat16)
        for name, call, state in (
            ("causal_conv1d", _conv, _conv_state), ("selective_scan", _scan, _scan_state), ("ssd", _ssd, _scan_state),
        ):
            if name not in there:
                continue
            _tail_equals(name, call(dim, place), state, x, tail)
            _row_equals(name, call(dim, place), x.view(-1, rows, dim))
            done.append(name)
            device.synchronize()
        if "rms_norm_gated" in there:
            weight = torch.rand(dim, device=place)
            y: Any = pyseq.rms_norm_gated(x, weight, x)
            end = x[:, -tail:]
            _assert_equal(y[:, -tail:], pyseq.rms_norm_gated(end, weight, end), "rms_norm_gated")
            done.append("rms_norm_gated")
    return {"elements": x.numel(), "ops": done, "summary": f"{x.numel()} elements: {', '.join(done)}"}


def _conv(dim: int, place: str) -> Any:
    weight = torch.randn(dim, 4, generator=torch.Generator().manual_seed(0)).to(place)

    def call(x: torch.Tensor, state: torch.Tensor | None = None) -> Any:
        return pyseq.causal_conv1d(x, weight, activation="silu", state=state, return_state=True)

    return call


def _scan(dim: int, place: str) -> Any:
    A = -0.1 - torch.rand(dim, 4, generator=torch.Generator().manual_seed(0)).to(place)

    def call(x: torch.Tensor, state: torch.Tensor | None = None) -> Any:
        B = x[..., :4]
        return pyseq.selective_scan(x, x, A, B, B, dt_softplus=True, state=state, return_state=True)

    return call


def _ssd(dim: int, place: str) -> Any:
    heads = max(1, dim // 64)
    A = -0.1 - torch.rand(heads, generator=torch.Generator().manual_seed(0)).to(place)

    def call(x: torch.Tensor, state: torch.Tensor | None = None) -> Any:
        B = x[..., None, :16]
        data = x.unflatten(-1, (heads, -1))
        y, last = pyseq.ssd(data, x[..., :heads], A, B, B, dt_softplus=True, state=state, return_state=True)
        return y.flatten(-2), last

    return call


def _conv_state(call: Any, before: torch.Tensor) -> torch.Tensor:
    return before[:, -3:].float().transpose(1, 2).contiguous()


def _scan_state(call: Any, before: torch.Tensor) -> Any:
    return call(before)[1]


def _tail_equals(name: str, call: Any, state_after: Any, x: torch.Tensor, tail: int) -> None:
    x.requires_grad_()
    y, last = call(x)
    (dx,) = torch.autograd.grad(y[:, -tail:].float().sum(), x)
    x.requires_grad_(False)
    with torch.no_grad():
        state = state_after(call, x[:, :-tail])
    end = x[:, -tail:].clone().requires_grad_()
    y_end, last_end = call(end, state)
    (dx_end,) = torch.autograd.grad(y_end.float().sum(), end)
    for what, a, b, kind in (("y", y[:, -tail:], y_end, "output"), ("state", last, last_end, "output"),
                             ("dx", dx[:, -tail:], dx_end, "gradient")):
        _agree(name, a, b, f"{what} of the last {tail} of {x.shape[1]} tokens", kind)


def _row_equals(name: str, call: Any, x: torch.Tensor) -> None:
    with torch.no_grad():
        y, state = call(x)
        y_row, state_row = call(x[-1:])
    _agree(name, y[-1:], y_row, f"y of the last of {len(x)} rows")
    _agree(name, state[-1:], state_row, f"state of the last of {len(x)} rows")


def _agree(name: str, a: torch.Tensor, b: torch.Tensor, what: str, kind: str = "output") -> None:
    """Forms that split time, and those chosen for other shapes, agree within the rounding of each, not in bits."""
    off = testing.error(a, b.double(), kind, REGISTRY[name].products)
    assert off <= 2.1, f"{name}: {what}: differs by {off:.3g} times what rounding explains"


def _assert_equal(actual: Any, expected: Any, what: str) -> None:
    for k, (a, b) in enumerate(zip(tensors(actual), tensors(expected), strict=True)):
        assert torch.equal(a, b), f"{what}: tensor {k} differs in bits"


def smallest(device: Device) -> dict[str, Any]:
    """Every kernel at its smallest shapes."""
    for op in ops(device):
        for sample in chosen(op):
            for dtype in (torch.float32, torch.bfloat16):
                with testing.on(device.backend) as place:
                    arguments = _arguments(op, sample, place, dtype=dtype)
                    _forward_backward(op, arguments)
                    if _steps(op, sample):
                        with torch.no_grad():
                            _step(op, arguments)
    device.synchronize()
    return {}


if __name__ == "__main__":
    assert sys.argv[1:] == ["smallest"], __doc__
    smallest(Cuda() if torch.cuda.is_available() else Dry())
