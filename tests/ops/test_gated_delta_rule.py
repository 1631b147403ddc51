"""gated_delta_rule and its cases: the two forms, the bits of the exact one, strange values, memory."""

import inspect

import pytest
import torch
from gated_inputs import (
    CHUNKS,
    GATES,
    OP,
    ROWS,
    SEQUENTIAL,
    drawn,
    float64,
    in_form,
    in_type,
    on_backends,
    on_gates,
    part,
)

import pyseq
from pyseq import testing
from pyseq.testing import assert_close, on, prepare

# ---- the two forms ---------------------------------------------------------------------------------------------------


@on_backends
@on_gates
@pytest.mark.parametrize("keys", [1, 8, 60, 64, 100, 128, 256])
def test_both_forms_match_float64(keys, gate, backend):
    for n, values in enumerate((1, 8, 60, 64, 100, 128, 256)):
        for time in (1, 16, 63, 65) if n % 2 else (15, 17, 64, 100):
            arguments = drawn(time, keys, values, gate=gate)
            exact = float64(arguments)
            for form in (SEQUENTIAL, CHUNKS):
                with on(backend) as device:
                    found = in_form(form, prepare(arguments, device, requires_grad=False))
                for name, actual, wide in zip(("y", "state"), found, exact, strict=True):
                    assert_close(actual, wide, f"{name}, form {form}, T {time}, V {values}")


@pytest.mark.skipif("simt" not in testing.backends(OP), reason="the emulator is not built")
@on_gates
@pytest.mark.parametrize(("time", "keys", "values"), [(1, 8, 1), (15, 1, 8), (17, 20, 9), (18, 33, 16)])
def test_both_forms_match_float64_on_the_emulator(time, keys, values, gate):
    arguments = drawn(time, keys, values, gate=gate)
    exact = float64(arguments)
    for form in (SEQUENTIAL, CHUNKS):
        with on("simt"):
            given = [arguments[n] for n in (*ROWS, "state")]
            found = OP.active.forward(*given, None, arguments["scale"], True, False, form)
        for actual, wide in zip(found, exact, strict=False):
            assert_close(actual, wide, f"form {form}")


@pytest.mark.parametrize("backend", testing.backends(OP))
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_where_rows_begin_decides_no_bits(name, backend):
    arguments = in_type(drawn(40, 16, 16), torch.bfloat16)
    odd = torch.zeros(*arguments[name].shape[:-1], 19, dtype=torch.bfloat16)
    odd[..., 3:] = arguments[name]
    with on(backend) as device:
        both = [prepare(a, device, requires_grad=False) for a in (arguments, arguments | {name: odd[..., 3:]})]
        y, moved = (
            OP.active.forward(*(given[n] for n in (*ROWS, "state")), None, 0.3, True, False, CHUNKS) for given in both
        )
    assert torch.equal(y[0], moved[0]) and torch.equal(y[1], moved[1])


@on_backends
@on_gates
def test_the_form_is_no_matter_to_packed_sequences(gate, backend):
    ends = [0, 0, 15, 16, 80, 145, 145, 180]
    arguments = drawn(180, 100, 70, gate=gate, sequences=7)
    exact = float64(arguments | {"cu_seqlens": torch.tensor(ends)})
    for form in (SEQUENTIAL, CHUNKS):
        with on(backend) as device:
            found = in_form(form, prepare(arguments, device, requires_grad=False),
                            cu_seqlens=torch.tensor(ends, device=device))
        for actual, wide in zip(found, exact, strict=True):
            assert_close(actual, wide, f"form {form}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_gates
@pytest.mark.parametrize(("keys", "values"), [(1, 1), (8, 60), (60, 100), (128, 128), (100, 17), (256, 40)])
def test_exact_has_the_bits_of_steps_pieces_and_packing(keys, values, gate, dtype):
    time, options = 70, {"scale": 0.7}
    given = in_type(drawn(time, keys, values, gate=gate), dtype)
    y, last = pyseq.gated_delta_rule(**given, exact=True, return_state=True)
    state, steps = given["state"].clone(), []
    for t in range(time):
        token = {n: given[n] if given[n] is None else given[n][:, t] for n in ROWS}
        steps.append(pyseq.gated_delta_rule_step(state, **token, **options))
    assert torch.equal(torch.stack(steps, 1), y) and torch.equal(state, last)
    pieces, state = [], given["state"]
    for begin, end in ((0, 33), (33, 34), (34, 70)):
        piece, state = pyseq.gated_delta_rule(**part(given, begin, end, state), exact=True, return_state=True)
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces, 1), y) and torch.equal(state, last)
    states = torch.cat([torch.zeros_like(given["state"]), given["state"]])
    ends = torch.tensor([0, 0, time])
    packed = pyseq.gated_delta_rule(**given | {"state": states}, cu_seqlens=ends, exact=True, return_state=True)
    assert torch.equal(packed[0], y) and torch.equal(packed[1][1:], last)


# ---- strange values --------------------------------------------------------------------------------------------------


@on_backends
@pytest.mark.parametrize("form", [SEQUENTIAL, CHUNKS])
@pytest.mark.parametrize(("gate", "name"), [(g, n) for g in GATES for n in ROWS if (g, n) != ("none", "g")])
def test_nan_goes_where_the_reference_has_it(gate, name, form, backend):
    arguments = drawn(40, 20, 18, gate=gate, batch=2, heads=2, value_heads=4)
    arguments[name][1, 21].flatten()[1] = torch.nan
    exact = float64(arguments)
    with on(backend) as device:
        found = in_form(form, prepare(arguments, device, requires_grad=False))
    for actual, wide in zip(found, exact, strict=True):
        assert torch.equal(actual.cpu().isnan(), wide.isnan())
        assert wide.isnan().any() or name == "q"


@on_backends
@pytest.mark.parametrize("form", [SEQUENTIAL, CHUNKS])
@pytest.mark.parametrize("gate", ["head", "key"])
def test_an_unseen_growth_is_nan_from_there_on(gate, form, backend):
    arguments = drawn(40, 20, 18, gate=gate)
    arguments["g"][0, 21, 1] = 1e-3
    with on(backend) as device:
        y, last = in_form(form, prepare(arguments, device, requires_grad=False))
    assert y[:, 21:, 1].isnan().all() and last[:, 1].isnan().all()
    assert y[:, :21].isfinite().all() and y[:, :, 0].isfinite().all() and last[:, 0].isfinite().all()


def test_growth_is_refused():
    for function, gate in ((pyseq.gated_delta_rule, "head"), (pyseq.kimi_delta_rule, "key")):
        arguments = drawn(5, 4, 3, gate=gate)
        arguments["g"].flatten()[-1] = 0.1
        with pytest.raises(ValueError, match="g"):
            function(**arguments)


@pytest.mark.parametrize(("change", "error", "said"), [
    ({"v": torch.randn(1, 5, 3, 3), "g": torch.zeros(1, 5, 3), "beta": torch.ones(1, 5, 3)}, ValueError, "HV"),
    ({"k": torch.randn(1, 5, 2, 5)}, ValueError, "k"), ({"beta": torch.ones(1, 5, 1)}, ValueError, "beta"),
    ({"g": torch.zeros(1, 5, 2, 5)}, ValueError, "g"), ({"g": torch.zeros(1, 5)}, ValueError, "g"),
    ({"q": torch.randn(1, 5, 2, 257), "k": torch.randn(1, 5, 2, 257)}, ValueError, "K"),
    ({"state": torch.zeros(1, 2, 4, 3, dtype=torch.bfloat16)}, TypeError, "state"), ({"beta": None}, TypeError, "beta"),
    ({"v": torch.ones(1, 5, 2, 3, dtype=torch.int64)}, TypeError, "v"), ({"scale": "one"}, TypeError, "scale"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(change, error, said):
    with pytest.raises(error, match=said):
        pyseq.gated_delta_rule(**drawn(5, 4, 3, heads=2) | {"state": None} | change)


def test_kimi_needs_a_decay():
    rows = drawn(5, 4, 3)
    with pytest.raises(TypeError, match="delta_net"):
        pyseq.kimi_delta_rule(rows["q"], rows["k"], rows["v"], None, rows["beta"])


@pytest.mark.parametrize("name", ["gated_delta_rule", "kimi_delta_rule", "delta_net"])
def test_the_reference_takes_the_same_arguments(name):
    for suffix in ("", "_step"):
        ours, plain = (inspect.signature(getattr(m, name + suffix)).parameters for m in (pyseq, pyseq.reference))
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in plain.values()
        ]


def test_nothing_of_the_size_of_a_and_b_is_in_memory():
    """q and k are shared by 32 value heads: a and b would be 32 times as large, and more than all that is allocated."""
    arguments = drawn(1024, 128, 4, heads=1, value_heads=32)
    arguments = prepare(arguments, "cpu", requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        y = pyseq.gated_delta_rule(**arguments)
        y.sum().backward()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert y.numel() * 4 < allocated < 1024 * 32 * 128 * 4
