"""What is mamba2_step's own: it is the ops it fuses, its states, and the errors of its arguments."""

import pytest
import torch

import pyseq
from pyseq import testing
from pyseq._library import REGISTRY
from pyseq.samples import cast, samples
from pyseq.testing import assert_close, on

OP = REGISTRY["mamba2_step"]
on_backends = pytest.mark.parametrize("backend", testing.backends(OP))
NAMES = [s.name for s in samples("mamba2_step")]


def arguments_of(name, dtype=torch.float32):
    sample = next(s for s in samples("mamba2_step") if s.name == name)
    return cast(sample.draw(), dtype, OP.float32)


def moved_to(device, arguments):
    return {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}


def by_ops(a):
    """The same, an op at a time, as Mamba2.step writes it."""
    heads, width, states = a["state"].shape[1:]
    norm, z = a["norm_weight"], a["z"]
    gate = None if z is None or norm is not None else z.unflatten(1, (heads, width))
    convolved = pyseq.causal_conv1d_step(a["conv_state"], a["xBC"], a["conv_weight"], a["conv_bias"], activation="silu")
    shared = (convolved.shape[1] - heads * width) // 2
    x, B, C = convolved.split([heads * width, shared, shared], -1)
    y = pyseq.ssd_step(
        a["state"], x.unflatten(1, (heads, width)), a["dt"], a["A"], B.unflatten(1, (-1, states)),
        C.unflatten(1, (-1, states)), a["D"], gate, a["dt_bias"], dt_softplus=True,
        dt_limit=a.get("dt_limit", (0.0, float("inf"))),
    ).flatten(1)  # fmt: skip
    options = {n: a[n] for n in ("eps", "group_size", "norm_before_gate") if n in a}
    return y if norm is None else pyseq.rms_norm_gated(y, norm, z, **options)


@on_backends
@pytest.mark.parametrize("name", [n for n in NAMES if n != "no_rows"])
def test_it_is_the_ops_it_fuses(name, backend):
    ours, theirs = arguments_of(name), arguments_of(name)
    with torch.no_grad():
        with on(backend) as device:
            ours = moved_to(device, ours)
            steps = [pyseq.mamba2_step(**ours).cpu() for _ in range(3)]
        for y in steps:
            assert_close(y, by_ops(theirs).double(), "y")
        assert torch.equal(ours["conv_state"].cpu(), theirs["conv_state"])
        assert_close(ours["state"].cpu(), theirs["state"].double(), "state")


@on_backends
@pytest.mark.parametrize("name", ["normed", "width_6", "wide", "wide_ragged", "wide_states"])
def test_states_in_bfloat16(name, backend):
    arguments = arguments_of(name)
    for n in OP.updates:
        arguments[n] = arguments[n].bfloat16()
    exact = testing.expected_update(OP, arguments)
    with on(backend) as device:
        actual = testing.updated(pyseq.mamba2_step, OP, moved_to(device, arguments))
    for a, e in zip(actual, exact, strict=True):
        assert_close(a, e, "bfloat16 state")
    assert actual[1].dtype == actual[2].dtype == torch.bfloat16


@on_backends
@pytest.mark.parametrize("name", ["normed", "wide"])
def test_rows_do_not_touch_one_another(name, backend):
    """A row of NaN leaves the others' bits alone: nothing is summed across the batch."""
    arguments = arguments_of(name)
    with on(backend) as device:
        moved = moved_to(device, arguments)
        clean = testing.updated(pyseq.mamba2_step, OP, moved)
        moved["xBC"][1] = float("nan")
        dirty = testing.updated(pyseq.mamba2_step, OP, moved)
    rows = [r for r in range(moved["xBC"].shape[0]) if r != 1]
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[rows], b[rows]) and b[1].isnan().any()


@on_backends
def test_slices_of_a_projection_are_read_where_they_lie(backend):
    """z, xBC and dt as the layer has them: neighbours in one row, at offsets that are no multiple of four."""
    arguments = arguments_of("wide_half")
    parts = [arguments[n] for n in ("z", "xBC", "dt")]
    row = torch.cat([torch.zeros(2, 1), *parts], -1)
    _, *slices = row.split([1, *(p.shape[1] for p in parts)], -1)
    moved = arguments | dict(zip(("z", "xBC", "dt"), slices, strict=True))
    assert pyseq.explain(pyseq.mamba2_step, **moved).notes == ()
    with on(backend) as device:
        apart = testing.updated(pyseq.mamba2_step, OP, moved_to(device, arguments))
        together = testing.updated(pyseq.mamba2_step, OP, moved)
    for a, b in zip(apart, together, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_a_head_that_would_grow_is_refused_or_nan(backend):
    arguments = arguments_of("plain")
    arguments["A"][1] = 0.5
    with pytest.raises(ValueError, match=r"^mamba2_step: A is 0\.5"), torch.no_grad():
        pyseq.mamba2_step(**arguments)
    with on(backend) as device, torch.no_grad():
        moved = moved_to(device, arguments)
        y = OP.active.step(*(moved[n] for n in moved), 0.0, 1e30, 1e-5, 6, False)
    heads = y.cpu().unflatten(1, (2, 3))
    assert heads[:, 1].isnan().all() and not heads[:, 0].isnan().any()
    assert moved["state"][:, 1].isnan().all() and not moved["state"][:, 0].isnan().any()


def test_float64_runs_through_the_reference():
    arguments = cast(next(iter(samples("mamba2_step"))).draw(), torch.float64, ())
    for a, b in zip(
        testing.updated(pyseq.mamba2_step, OP, arguments),
        testing.updated(pyseq.reference.mamba2_step, OP, arguments),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert pyseq.explain(pyseq.mamba2_step, **arguments).kernel == "reference"


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"xBC": 3}, TypeError, "xBC is int"),
    ({"xBC": torch.zeros(2, 15)}, ValueError, r"xBC is of 15 channels, expected H P \+ 2 G N with H P = 6, N = 4"),
    ({"xBC": torch.zeros(2, 6)}, ValueError, "xBC is of 6 channels"),
    ({"z": torch.zeros(2, 5)}, ValueError, r"z has shape \[2, 5\], expected \[B, H P\] with"),
    ({"dt": torch.zeros(2, 3)}, ValueError, "dt has shape"),
    ({"state": torch.zeros(2, 2, 3, 4, dtype=torch.float16)}, TypeError, "state has dtype float16"),
    ({"state": torch.zeros(2, 2, 3, 4, dtype=torch.float64)}, TypeError, "state has dtype float64"),
    ({"conv_state": torch.zeros(2, 14, 1).expand(2, 14, 3)}, ValueError, "conv_state is expanded"),
    ({"norm_weight": torch.zeros(5)}, ValueError, "norm_weight has shape"),
    ({"group_size": 4}, ValueError, "group_size is 4, expected a divisor of H P = 6"),
    ({"eps": -1.0}, ValueError, "eps is -1.0"),
    ({"dt_limit": (0.2, 0.1)}, ValueError, "dt_limit is"),
    ({"dt_limit": 3}, TypeError, "dt_limit is 3"),
    ({"norm_before_gate": 1}, TypeError, "norm_before_gate is int"),
])  # fmt: skip
def test_wrong_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=f"^mamba2_step: .*{message}"):
        pyseq.mamba2_step(**(arguments_of("plain") | changes))


def test_more_states_than_a_block_holds_are_refused_on_cuda():
    if "simt" not in OP.backends:
        pytest.fail("this test needs the emulator: build with PYSEQ_SIMT")
    arguments = arguments_of("one") | {
        "state": torch.zeros(1, 1, 1, 12000), "xBC": torch.zeros(1, 24001), "conv_state": torch.zeros(1, 24001, 0),
        "conv_weight": torch.zeros(24001, 1),
    }  # fmt: skip
    with pytest.raises(RuntimeError, match="state has N = 12000, expected at most 11776"), torch.no_grad():
        OP.kernels["pyseq_simt"].step(*arguments.values(), 0.0, 1e30, 1e-5, 1, False)
