"""Inputs of gated_delta_rule for tests of its own, and its two forms."""

import pytest
import torch

from pyseq import _library, reference, testing
from pyseq.samples import cast

OP = _library.REGISTRY["gated_delta_rule"]
SEQUENTIAL, CHUNKS = 1, 2
GATES = ("none", "head", "key")
ROWS = ("q", "k", "v", "g", "beta")
BACKENDS = [b for b in testing.backends(OP) if b != "simt"]   # the emulator is too slow for most shapes
on_backends = pytest.mark.parametrize("backend", BACKENDS)
on_gates = pytest.mark.parametrize("gate", GATES)


def drawn(time, keys, values, *, gate="head", batch=1, heads=1, value_heads=2, most=1.0, sequences=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    rows = (batch, time, value_heads)
    log = -torch.sigmoid(normal(*rows, keys) - 1)
    return {
        "q": torch.nn.functional.normalize(normal(batch, time, heads, keys), dim=-1),
        "k": torch.nn.functional.normalize(normal(batch, time, heads, keys), dim=-1),
        "v": normal(*rows, values), "g": {"none": None, "head": log[..., 0], "key": log}[gate],
        "beta": most * torch.sigmoid(normal(*rows)), "scale": 0.7,
        "state": normal(sequences or batch, value_heads, keys, values),
    }  # fmt: skip


def in_type(arguments, dtype):
    return {n: v.to(dtype) if n in ROWS and v is not None else v for n, v in arguments.items()}


def part(arguments, begin, end, state):
    return {n: v[:, begin:end] if n in ROWS and v is not None else v for n, v in arguments.items()} | {"state": state}


def in_form(form, arguments, *, cu_seqlens=None):
    """(y, state) by one form; what it keeps for the backward must not matter."""
    given = [arguments[n] for n in (*ROWS, "state")]
    y, last, _ = OP.active.forward(*given, cu_seqlens, arguments["scale"], True, False, form)
    again = OP.active.forward(*given, cu_seqlens, arguments["scale"], True, True, form)
    for a, b in zip((y, last), again, strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    return y, last


def float64(arguments):
    wide = cast(arguments, torch.float64, ())
    return reference.gated_delta_rule(**wide, return_state=True)
