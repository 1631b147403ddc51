"""What is mamba_step's own: it is the ops it fuses, its states, and the errors of its arguments."""

import pytest
import torch

import pyseq
from pyseq import testing
from pyseq._library import REGISTRY
from pyseq.samples import cast, samples
from pyseq.testing import assert_close, on

OP = REGISTRY["mamba_step"]
on_backends = pytest.mark.parametrize("backend", testing.backends(OP))


def arguments_of(name, dtype=torch.float32):
    sample = next(s for s in samples("mamba_step") if s.name == name)
    return cast(sample.draw(), dtype, OP.float32)


def by_ops(a):
    """The same, an op at a time, as Mamba.step writes it."""
    rank, states = a["dt_proj_weight"].shape[1], a["A"].shape[1]
    u = pyseq.causal_conv1d_step(a["conv_state"], a["x"], a["conv_weight"], a["conv_bias"], activation="silu")
    low, B, C = torch.nn.functional.linear(u, a["x_proj_weight"]).split([rank, states, states], -1)
    if a.get("rms_eps") is not None:
        low, B, C = (pyseq.rms_norm_gated(v, torch.ones(v.shape[-1]), eps=a["rms_eps"]) for v in (low, B, C))
    dt = torch.nn.functional.linear(low, a["dt_proj_weight"])
    return pyseq.selective_scan_step(
        a["state"], u, dt, a["A"], B, C, a["D"], a["z"], a["dt_bias"], dt_softplus=True
    )  # fmt: skip


@on_backends
@pytest.mark.parametrize("name", ["plain", "falcon", "width_6", "wide"])
def test_it_is_the_ops_it_fuses(name, backend):
    ours, theirs = arguments_of(name), arguments_of(name)
    with torch.no_grad():
        with on(backend) as device:
            ours = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in ours.items()}
            steps = [pyseq.mamba_step(**ours).cpu() for _ in range(3)]
        for y in steps:
            assert_close(y, by_ops(theirs).double(), "y")
        assert torch.equal(ours["conv_state"].cpu(), theirs["conv_state"])
        assert_close(ours["state"].cpu(), theirs["state"].double(), "state")


@on_backends
@pytest.mark.parametrize("name", ["falcon", "wide", "wide_states"])
def test_states_in_bfloat16(name, backend):
    arguments = arguments_of(name)
    for n in OP.updates:
        arguments[n] = arguments[n].bfloat16()
    exact = testing.expected_update(OP, arguments)
    with on(backend) as device:
        moved = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
        actual = testing.updated(pyseq.mamba_step, OP, moved)
    for a, e in zip(actual, exact, strict=True):
        assert_close(a, e, "bfloat16 state")
    assert actual[1].dtype == actual[2].dtype == torch.bfloat16


@on_backends
def test_rows_do_not_touch_one_another(backend):
    """A row of NaN leaves the others' bits alone: nothing is summed across the batch."""
    arguments = arguments_of("wide")
    with on(backend) as device:
        moved = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
        clean = testing.updated(pyseq.mamba_step, OP, moved)
        moved["x"][1] = float("nan")
        dirty = testing.updated(pyseq.mamba_step, OP, moved)
    rows = [0, 2, 3, 4]
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[rows], b[rows]) and b[1].isnan().any()


@on_backends
def test_more_channels_than_resident_blocks_take_at_once(backend):
    """264 blocks of 64 channels: the first one goes on to a second tile."""
    D = 64 * 264 + 5
    torch.manual_seed(0)
    arguments = {
        "conv_state": torch.randn(1, D, 1), "state": torch.randn(1, D, 1), "x": torch.randn(1, D),
        "z": torch.randn(1, D), "conv_weight": torch.randn(D, 2), "conv_bias": None,
        "x_proj_weight": torch.randn(3, D) / D**0.5, "dt_proj_weight": torch.randn(D, 1), "dt_bias": torch.randn(D),
        "A": -torch.rand(D, 1), "D": torch.randn(D),
    }  # fmt: skip
    exact = testing.expected_update(OP, arguments)
    with on(backend) as device:
        moved = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
        actual = testing.updated(pyseq.mamba_step, OP, moved)
    for a, e in zip(actual, exact, strict=True):
        assert_close(a, e, "many tiles")


def test_float64_runs_through_the_reference():
    arguments = cast(next(iter(samples("mamba_step"))).draw(), torch.float64, ())
    for a, b in zip(
        testing.updated(pyseq.mamba_step, OP, arguments),
        testing.updated(pyseq.reference.mamba_step, OP, arguments),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert pyseq.explain(pyseq.mamba_step, **arguments).kernel == "reference"


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"x": 3}, TypeError, "x is int"),
    ({"z": torch.zeros(2, 5)}, ValueError, r"z has shape \[2, 5\], expected \[B, D\]"),
    ({"x_proj_weight": torch.zeros(7, 6)}, ValueError, r"expected \[R \+ 2 N, D\] with R \+ 2 N = 8"),
    ({"A": torch.zeros(6, 0)}, ValueError, "A is of shape"),
    ({"state": torch.zeros(2, 6, 3, dtype=torch.float16)}, TypeError, "state has dtype float16"),
    ({"state": torch.zeros(2, 6, 3, dtype=torch.float64)}, TypeError, "state has dtype float64"),
    ({"conv_state": torch.zeros(2, 6, 1).expand(2, 6, 3)}, ValueError, "conv_state is expanded"),
    ({"rms_eps": -1.0}, ValueError, "rms_eps is -1.0"),
    ({"rms_eps": "small"}, TypeError, "rms_eps is str"),
])  # fmt: skip
def test_wrong_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=f"^mamba_step: .*{message}"):
        pyseq.mamba_step(**(arguments_of("plain") | changes))


def test_a_projection_too_wide_for_cuda_is_refused():
    if "simt" not in OP.backends:
        pytest.fail("this test needs the emulator: build with PYSEQ_SIMT")
    arguments = arguments_of("plain") | {"dt_proj_weight": torch.zeros(6, 7000), "x_proj_weight": torch.zeros(7006, 6)}
    with pytest.raises(RuntimeError, match="x_proj_weight has 7006 rows, expected at most 6080"), torch.no_grad():
        OP.kernels["pyseq_simt"].step(*(arguments[n] for n in arguments), None)
