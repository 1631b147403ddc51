"""All that an op has, on the emulator: its forward, backward and step."""

import torch

from pyseq import _library, testing
from pyseq._library import HAS_SIMT, REGISTRY
from pyseq.samples import cast
from pyseq.testing import as_tuple, differentiable, loss, prepare

if HAS_SIMT:
    from pyseq import _simt

OPS = [op for op in REGISTRY.values() if "simt" in op.backends]


def cut(op, arguments, begin, end):
    return {n: v[:, begin:end] if n in op.time and v is not None else v for n, v in arguments.items()}


def stepped(op, arguments):
    """The results of up to two steps, from the state before the first token, and the state after them."""
    token = {n: arguments[n] for n in op.time if n in arguments}
    options = {n: v for n, v in arguments.items() if n not in (*op.time, "state", "return_state", "cu_seqlens")}
    with torch.no_grad():
        _, state = op.function(**(cut(op, arguments, 0, 0) | {"return_state": True}))
        tokens = range(min(2, arguments[op.time[0]].shape[1]))
        y = [op.step(state, **{n: v if v is None else v[:, t] for n, v in token.items()}, **options) for t in tokens]
    return (*y, *as_tuple(state))


def computed(op, sample, dtype):
    """By kind, the names of the kernels launched for it and what they gave."""
    arguments = prepare(cast(sample.draw(), dtype, op.float32), "cpu", requires_grad=op.differentiable)
    launched, results = {}, {}

    def run(kind, function):
        before = _simt.launches()
        results[kind] = function()
        launched[kind] = {name for name, n in _simt.launches().items() if n > before.get(name, 0)}

    with _library.use_namespace("pyseq_simt"):
        if not op.differentiable:
            run("step", lambda: testing.updated(op.function, op, arguments))
            return launched, results
        leaves = differentiable(arguments)
        run("forward", lambda: as_tuple(op.function(**arguments)))
        total = loss(results["forward"])
        run("backward", lambda: torch.autograd.grad(total, list(leaves.values()), allow_unused=True))
        if "step" in op.kinds and "cu_seqlens" not in arguments:
            run("step", lambda: stepped(op, arguments))
    return launched, results
