"""What a delta-rule layer is made from: its arguments, parameters and first values."""

import inspect
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from delta_layers import make

import pyseq

LAYERS = [pyseq.GatedDeltaNet, pyseq.KimiDeltaAttention]


def shapes(layer):
    return {name: tuple(p.shape) for name, p in layer.state_dict().items()}


def test_names_and_shapes_are_those_of_fla():
    common = {
        "A_log": (4,), "q_proj.weight": (16, 32), "k_proj.weight": (16, 32), "v_proj.weight": (64, 32),
        "b_proj.weight": (4, 32), "q_conv1d.weight": (16, 1, 4), "k_conv1d.weight": (16, 1, 4),
        "v_conv1d.weight": (64, 1, 4), "o_norm.weight": (16,), "o_proj.weight": (32, 64),
    }  # fmt: skip
    sizes = {"head_dim": 8, "expand_v": 2, "num_heads": 2, "num_v_heads": 4}
    gated = pyseq.GatedDeltaNet(32, **sizes)
    assert shapes(gated) == common | {"dt_bias": (4,), "a_proj.weight": (4, 32), "g_proj.weight": (64, 32)}
    kimi = pyseq.KimiDeltaAttention(32, **sizes)
    assert shapes(kimi) == common | {
        "dt_bias": (32,), "f_proj.0.weight": (16, 32), "f_proj.1.weight": (32, 16),
        "g_proj.0.weight": (16, 32), "g_proj.1.weight": (64, 16), "g_proj.1.bias": (64,),
    }  # fmt: skip
    for layer in (gated, kimi):
        assert all(p._no_weight_decay for p in (layer.A_log, layer.dt_bias, layer.o_norm.weight))
    bare = pyseq.GatedDeltaNet(32, use_gate=False, use_short_conv=False, **sizes)
    assert not [name for name in shapes(bare) if "conv" in name or "g_proj" in name]


def test_the_arguments_are_those_of_fla():
    first = ["hidden_size", "expand_v", "head_dim", "num_heads", "num_v_heads", "mode"]
    last = ["conv_size", "conv_bias", "layer_idx", "norm_eps"]
    middle = ["use_gate", "use_short_conv", "allow_neg_eigval"]
    names = [list(inspect.signature(layer).parameters) for layer in LAYERS]
    assert names[0] == [*first, *middle, *last, "output_gate_activation", "device", "dtype"]
    assert names[1] == [*first, *middle[1:], "safe_gate", "lower_bound", *last, "device", "dtype"]


def test_initial_values():
    torch.manual_seed(1)
    for layer, low in zip((cls(16, head_dim=4, num_heads=300) for cls in LAYERS), (0, 1), strict=True):
        A, dt = layer.A_log.exp(), F.softplus(layer.dt_bias)
        assert low <= A.min() and 15 < A.max() <= 16.001 and torch.isfinite(layer.A_log).all()
        assert dt.min() >= 0.999e-3 and dt.max() <= 0.1001 and (layer.o_norm.weight == 1).all()
    assert not pyseq.KimiDeltaAttention(16, head_dim=4, num_heads=2, safe_gate=True, lower_bound=-5.0).A_log.any()


def test_the_default_heads_run():
    for layer in LAYERS:
        made = layer(16, num_heads=1)
        with torch.no_grad():
            y, state = made(torch.randn(1, 3, 16))
            assert y.shape == (1, 3, 16) and made.step(torch.randn(1, 16), state)[0].shape == (1, 16)
            with pytest.raises(ValueError, match=r"state\.delta must end in head_v_dim"):
                made(torch.randn(1, 3, 16), state._replace(delta=torch.zeros(1, 1, made.head_k_dim, 600)))
        with pytest.raises(ValueError, match="head_dim must be at most 256, got 257"):
            layer(16, head_dim=257, num_heads=1)


@pytest.mark.parametrize("shape", [(2, 20), (2, 3, 25), (2, 3, 1, 20)])
@pytest.mark.parametrize("kind", ["plain", "kimi"])
def test_wrong_input_names_it(shape, kind):
    with pytest.raises(ValueError, match="x must be"):
        make(kind)(torch.randn(shape))


OPTIONS = {
    "expand_v": st.sampled_from([0, -1, 0.001, 0.25, 0.3, 1, 1.5, "2", True, math.nan, math.inf]),
    "head_dim": st.sampled_from([-1, 0, 4, 4.0, "4", True]),
    "num_heads": st.sampled_from([0, 1, 3, None]),
    "num_v_heads": st.sampled_from([None, 0, 2, 3, 4, 6]),
    "mode": st.sampled_from(["chunk", "fused_recurrent", "fast", None]),
    "use_short_conv": st.sampled_from([False, True, None, 1]),
    "allow_neg_eigval": st.sampled_from([False, True, 2.0]),
    "conv_size": st.integers(-1, 3),
    "conv_bias": st.sampled_from([False, True, 0]),
    "norm_eps": st.sampled_from([0.0, -1.0, 1e-6, math.nan, math.inf]),
}
OWN = [
    {"use_gate": st.sampled_from([True, False, 1]), "output_gate_activation": st.sampled_from(["silu", "relu", None])},
    {"safe_gate": st.sampled_from([True, False, 1]), "lower_bound": st.sampled_from([None, -5, 0.0, 1.0, math.nan])},
]


@pytest.mark.parametrize("layer, own", [*zip(LAYERS, OWN, strict=True)])
def test_constructor_works_or_names_the_argument(layer, own):
    @hypothesis.settings(deadline=None, max_examples=60)
    @hypothesis.given(st.fixed_dictionaries({}, optional=OPTIONS | own))
    def check(options):
        try:
            made = layer(8, **{"head_dim": 4, "num_heads": 2, **options})
        except ValueError as error:
            assert any(name in str(error) for name in [*options, "lower_bound"])
        else:
            assert torch.isfinite(made(torch.randn(1, 3, 8))[0]).all()

    check()
