"""The parameters that need more digits than a half type has, in every layer."""

import pytest
import torch

import pyseq

LAYERS = {"Mamba": lambda: pyseq.Mamba(16), "Mamba2": lambda: pyseq.Mamba2(16, d_state=8, headdim=8)}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16])
def default(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def exact_types(layer):
    return {layer.get_parameter(name).dtype for name in layer.exact}


@every_layer
def test_the_default_type_is_the_layer_s(make, default):
    layer, x = make(), torch.randn(2, 5, 16)
    wide = torch.float64 if default == torch.float64 else torch.float32
    assert layer.in_proj.weight.dtype == default and exact_types(layer) == {wide}
    state = layer.init_state(2)
    assert {t.dtype for t in state} == {wide}
    y, last = layer(x, state)
    with torch.no_grad():
        stepped, _ = layer.step(x[:, 0], state)
    assert y.dtype == stepped.dtype == default and {t.dtype for t in last} == {wide}
    torch.testing.assert_close(stepped, y[:, 0].detach(), rtol=2e-2, atol=2e-2)


@every_layer
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_double_layer_made_half_has_float32_where_digits_count(make, half):
    layer, x = make().double(), torch.randn(2, 5, 16, dtype=half)
    want = {name: p.detach().float() for name, p in layer.named_parameters()}
    layer(x.double())[0].sum().backward()
    layer.to(half)
    assert exact_types(layer) == {torch.float32}
    assert all(torch.equal(layer.get_parameter(name), want[name]) for name in layer.exact)
    assert all(layer.get_parameter(name).grad.dtype == torch.float32 for name in layer.exact)
    y, _ = layer(x, layer.init_state(2))
    with torch.no_grad():
        stepped, _ = layer.step(x[:, 0], layer.init_state(2))
    assert y.dtype == stepped.dtype == half
