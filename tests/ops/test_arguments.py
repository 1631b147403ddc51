"""Whatever is passed: the call is within the contract and runs, or a ValueError or TypeError names the argument."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyseq._library import REGISTRY
from pyseq.samples import cast, samples
from pyseq.testing import as_tuple

OPS = list(REGISTRY.values())

WRONG_KINDS = {
    "a string": lambda t: "abc",
    "a number": lambda t: 3,
    "a list": lambda t: t.tolist(),
    "integers": lambda t: t.to(torch.int64),
    "booleans": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "sparse": lambda t: t.to_sparse(),
    "on another device": lambda t: t.to("meta"),
}
OTHER_SHAPES = {
    "no axes": lambda t, axis: t.sum(),
    "an axis less": lambda t, axis: t.select(axis, 0) if t.shape[axis] else t.sum(axis),
    "an axis more": lambda t, axis: t.unsqueeze(axis),
    "longer": lambda t, axis: torch.cat([t, t.narrow(axis, 0, min(1, t.shape[axis]))], axis),
    "shorter": lambda t, axis: t.narrow(axis, 0, max(0, t.shape[axis] - 1)),
    "empty": lambda t, axis: t.narrow(axis, 0, 0),
    "flat": lambda t, axis: t.flatten(),
    "repeated by stride 0": lambda t, axis: t.narrow(axis, 0, min(1, t.shape[axis])).expand(t.shape),
}


def arguments_of(op, sample):
    return cast(sample.draw(), torch.float32, op.float32)


def runs_or_names_the_argument(op, function, arguments, name):
    try:
        with torch.no_grad():
            as_tuple(function(**arguments))
    except (ValueError, TypeError) as error:
        message = str(error)
        assert message.startswith(f"{function.__name__}: "), message
        assert any(f"{n} " in message for n in arguments), message
    return name


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_wrong_kind_is_refused_by_name(op, data):
    arguments = arguments_of(op, data.draw(st.sampled_from([s for s in samples(op.name) if s.small])))
    tensors = [n for n, v in arguments.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    name = data.draw(st.sampled_from(tensors))
    kind = data.draw(st.sampled_from(sorted(WRONG_KINDS)))
    arguments[name] = WRONG_KINDS[kind](arguments[name])
    with pytest.raises((TypeError, ValueError)) as raised, torch.no_grad():
        op.function(**arguments)
    message = str(raised.value)
    assert message.startswith(f"{op.name}: ")
    # The first argument sets the device, so a wrong device there is seen at the next one.
    assert f"{name} " in message or kind == "on another device", message


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_another_shape_runs_or_is_refused(op, data):
    arguments = arguments_of(op, data.draw(st.sampled_from([s for s in samples(op.name) if s.small])))
    tensors = [n for n, v in arguments.items() if isinstance(v, torch.Tensor) and v.dim()]
    name = data.draw(st.sampled_from(tensors))
    shape = data.draw(st.sampled_from(sorted(OTHER_SHAPES)))
    axis = data.draw(st.integers(0, arguments[name].dim() - 1))
    arguments[name] = OTHER_SHAPES[shape](arguments[name], axis)
    runs_or_names_the_argument(op, op.function, arguments, name)


@pytest.mark.parametrize("op", [op for op in OPS if op.packs], ids=lambda op: op.name)
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_wrong_cu_seqlens_are_refused(op, data):
    sample = data.draw(st.sampled_from([s for s in samples(op.name) if s.small and "cu_seqlens" not in s.draw()]))
    arguments = {n: v for n, v in arguments_of(op, sample).items() if n != "state"}
    values = data.draw(st.lists(st.integers(-(2**62), 2**62) | st.integers(-2, 12), max_size=6))
    arguments["cu_seqlens"] = torch.tensor(values, dtype=torch.int64)
    batch, time = arguments[op.time[0]].shape[:2]
    legal = batch == 1 and len(values) >= 2 and values[0] == 0 and values[-1] == time and values == sorted(values)
    if legal:
        op.function(**arguments)
    else:
        with pytest.raises((TypeError, ValueError), match=f"^{op.name}: .*cu_seqlens"):
            op.function(**arguments)


@pytest.mark.parametrize("op", [op for op in OPS if op.step is not None], ids=lambda op: op.name)
def test_a_step_with_grad_mode_on_is_refused(op):
    sample = next(s for s in samples(op.name) if s.small and s.draw()[op.time[0]].shape[1] > 0)
    arguments = arguments_of(op, sample) | {"return_state": True}
    arguments.pop("cu_seqlens", None)
    with torch.no_grad():
        _, state = op.function(**arguments)
    token = {n: arguments[n][:, 0] for n in op.time if arguments.get(n) is not None}
    options = {n: v for n, v in arguments.items() if n not in (*token, "state", "return_state")}
    token[op.time[0]].requires_grad_()
    with pytest.raises(RuntimeError, match=f"pyseq.{op.name}_step has no gradient"):
        op.step(state, **token, **options)
    with torch.no_grad():
        op.step(state, **token, **options)


@pytest.mark.parametrize("op", [op for op in OPS if op.step is not None], ids=lambda op: op.name)
def test_a_float64_state_needs_float64_data(op):
    """No call is sent to the reference, which is slow, by the dtype of its state."""
    sample = next(s for s in samples(op.name) if s.small and s.draw()[op.time[0]].shape[1] > 0)
    arguments = arguments_of(op, sample) | {"return_state": True}
    arguments.pop("cu_seqlens", None)
    with torch.no_grad():
        _, state = op.function(**(arguments | {"state": None}))
        with pytest.raises(TypeError, match=f"^{op.name}: state has dtype float64"):
            op.function(**(arguments | {"state": state.double()}))
        token = {n: arguments[n][:, 0] for n in op.time if arguments.get(n) is not None}
        options = {n: v for n, v in arguments.items() if n not in (*token, "state", "return_state")}
        with pytest.raises(TypeError, match=f"^{op.name}_step: state has dtype float64"):
            op.step(state.double(), **token, **options)
