"""What a Mamba-2 layer is made from: its arguments, parameters and first values."""

import inspect
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from mamba2_layers import make

import pyseq


def test_names_shapes_and_flags():
    layer = pyseq.Mamba2(64)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "dt_bias": (2,),
        "A_log": (2,),
        "D": (2,),
        "in_proj.weight": (2 * 128 + 2 * 128 + 2, 64),
        "conv1d.weight": (384, 1, 4),
        "conv1d.bias": (384,),
        "norm.weight": (128,),
        "out_proj.weight": (64, 128),
    }
    assert set(layer.state_dict()) == set(shapes)
    exact = (layer.A_log, layer.D, layer.dt_bias, layer.norm.weight)
    assert all(p._no_weight_decay for p in exact) and layer.dt_bias._no_reinit
    wide = pyseq.Mamba2(64, d_ssm=64, ngroups=1, D_has_hdim=True, rmsnorm=False, bias=True)
    assert wide.in_proj.weight.shape == (256 + 256 + 1, 64) and wide.D.shape == (64,) and wide.A_log.shape == (1,)
    assert "norm.weight" not in wide.state_dict() and wide.out_proj.weight.shape == (64, 128)


def test_the_arguments_are_those_of_mamba_ssm():
    names = list(inspect.signature(pyseq.Mamba2).parameters)
    assert names == [
        "d_model", "d_state", "d_conv", "conv_init", "expand", "headdim", "d_ssm", "ngroups", "A_init_range",
        "D_has_hdim", "rmsnorm", "norm_before_gate", "dt_min", "dt_max", "dt_init_floor", "dt_limit", "bias",
        "conv_bias", "chunk_size", "use_mem_eff_path", "layer_idx", "process_group", "sequence_parallel", "device",
        "dtype", "d_inner", "norm_eps",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="process_group"):
        pyseq.Mamba2(64, process_group=object())
    torch.manual_seed(0)
    x, first = torch.randn(1, 9, 64), pyseq.Mamba2(64)
    other = pyseq.Mamba2(64, chunk_size=64, use_mem_eff_path=False, sequence_parallel=False)
    other.load_state_dict(first.state_dict())
    assert torch.equal(first(x)[0], other(x)[0])


def test_initial_values():
    torch.manual_seed(1)
    layer = pyseq.Mamba2(512, headdim=4, dt_min=0.01, dt_max=0.2, A_init_range=(2, 5), conv_init=0.25)
    dt, A = F.softplus(layer.dt_bias), -layer.A()
    assert dt.min() >= 0.01 * 0.999 and dt.max() <= 0.2 * 1.001
    assert A.min() >= 2 * 0.999 and A.max() <= 5 * 1.001 and A.std() > 0.5
    assert (layer.D == 1).all() and (layer.norm.weight == 1).all()
    assert 0.24 < layer.conv1d.weight.abs().max() <= 0.25
    floor = pyseq.Mamba2(512, headdim=4, dt_init_floor=0.05)
    assert F.softplus(floor.dt_bias).min() >= 0.05 * 0.999
    torch.testing.assert_close(-pyseq.Mamba2(64, A_init_range=(3, 3)).A(), torch.full((2,), 3.0))


@pytest.mark.parametrize("shape", [(2, 24), (2, 3, 25), (2, 3, 1, 24)])
def test_wrong_input_names_it(shape):
    with pytest.raises(ValueError, match="x must be"):
        make()(torch.randn(shape))


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(
    st.fixed_dictionaries(
        {},
        optional={
            "d_state": st.integers(-2, 3) | st.floats(),
            "d_conv": st.integers(-2, 3),
            "expand": st.sampled_from([0, -1, 0.001, 1, 1.5, "2", True, math.nan, math.inf]),
            "headdim": st.sampled_from([-1, 0, 1, 2, 3, 4, "4", True]),
            "d_ssm": st.sampled_from([None, 0, 3, 4, 8, 17]),
            "ngroups": st.sampled_from([-1, 0, 1, 2, 3]),
            "A_init_range": st.sampled_from([(1, 16), [1, 1], (0, 1), (2, 1), (1,), 3, (1, math.inf), ("a", "b")]),
            "dt_limit": st.sampled_from([(0.0, math.inf), [0.1, 0.1], (-1, 1), (1, 0), (0,), None, (math.nan, 1)]),
            "dt_min": st.floats(-1, 1),
            "dt_max": st.floats(-1, 1) | st.sampled_from([math.inf, math.nan, 1e300, "1"]),
            "dt_init_floor": st.sampled_from([0, 1e-4, -1, math.nan, math.inf, None]),
            "chunk_size": st.sampled_from([1, 100, 0, -1, 2.5, True, None]),
            "conv_init": st.sampled_from([None, 0.5, -1.0, math.nan]),
            "norm_before_gate": st.sampled_from([False, True, None, 1]),
            "norm_eps": st.sampled_from([0.0, -1.0, 1e-6, math.nan, math.inf]),
        },
    )
)
def test_constructor_works_or_names_the_argument(options):
    try:
        layer = pyseq.Mamba2(8, **{"headdim": 4, "d_state": 3, **options})
    except ValueError as error:
        assert any(name in str(error) for name in [*options, "d_inner"])
    else:
        assert torch.isfinite(layer.dt_bias).all() and torch.isfinite(layer(torch.randn(1, 3, 8))[0]).all()
