"""Inputs of ssd for its tests, and how its results are judged."""

import torch

import pyseq
from pyseq import _library, testing
from pyseq.testing import assert_close, gradients, on, prepare

BACKENDS = testing.backends(_library.REGISTRY["ssd"])
TIME = ("x", "dt", "B", "C", "z")


def wave(offset, *shape):
    n = torch.Size(shape).numel()
    return torch.sin(0.7 * torch.arange(n, dtype=torch.float64) + offset).reshape(shape)


def drawn(batch=2, time=5, heads=3, width=4, states=3, groups=1, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    return {
        "x": normal(batch, time, heads, width), "dt": normal(batch, time, heads), "A": -normal(heads).exp(),
        "B": normal(batch, time, groups, states), "C": normal(batch, time, groups, states), "D": normal(heads),
        "z": normal(batch, time, heads, width), "dt_bias": normal(heads) - 2, "dt_softplus": True,
        "state": normal(batch, heads, width, states), "return_state": True,
    }


def packed(ends, seed=0, **sizes):
    arguments = drawn(1, ends[-1], **sizes, seed=seed) | {"cu_seqlens": torch.tensor(ends)}
    shape = (len(ends) - 1, *arguments["state"].shape[1:])
    return arguments | {"state": torch.randn(shape, generator=torch.Generator().manual_seed(seed))}


def without(arguments, *names):
    return {n: v for n, v in arguments.items() if n not in names}


def in_type(arguments, dtype):
    return arguments | {n: arguments[n].to(dtype) for n in TIME if arguments.get(n) is not None}


def cut(arguments, begin, end):
    return arguments | {n: arguments[n][:, begin:end] for n in TIME if arguments.get(n) is not None}


def token(arguments, t):
    return {n: arguments[n][:, t] for n in TIME if arguments.get(n) is not None}


def exact(arguments):
    return testing.expected(_library.REGISTRY["ssd"], arguments)


def check(arguments, backend="cpu"):
    """Outputs and gradients against the reference in float64."""
    products = testing.products_of(_library.REGISTRY["ssd"], arguments)
    with on(backend) as device:
        outputs, grads = gradients(pyseq.ssd, prepare(arguments, device, requires_grad=True))
    exact_outputs, exact_grads = exact(arguments)
    for k, (y, e) in enumerate(zip(outputs, exact_outputs, strict=True)):
        assert_close(y, e, f"output {k}", "output", products)
    for name, grad in grads.items():
        assert_close(grad, exact_grads[name], f"gradient of {name}", "gradient", testing.products_in(name, products))
