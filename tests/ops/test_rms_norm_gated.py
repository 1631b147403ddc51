"""What is rms_norm_gated's own: golden values, and the errors of its arguments."""

import pytest
import torch

import pyseq


def wave(offset, *shape):
    n = torch.Size(shape).numel()
    return torch.sin(0.7 * torch.arange(n, dtype=torch.float64) + offset).reshape(shape)


@pytest.mark.parametrize(("norm_first", "golden"), [
    (False, [0.011803880, 1.189464987, 1.223059165, 0.467397554]),
    (True, [0.006288857, 0.633721761, 0.796047952, 0.304213301]),
])
def test_golden_values(norm_first, golden):
    x, z, w = wave(0.1, 1, 4), wave(0.2, 1, 4), wave(0.3, 4)
    for dtype, atol in ((torch.float64, 1e-9), (torch.float32, 1e-6)):
        y = pyseq.rms_norm_gated(x.to(dtype), w, z.to(dtype), group_size=2, norm_before_gate=norm_first)
        assert torch.allclose(y.double(), torch.tensor([golden], dtype=torch.float64), atol=atol, rtol=0)


def test_the_sum_is_float32_and_its_gradient_counts():
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    residual = torch.randn(3, 8, requires_grad=True)
    _, total = pyseq.rms_norm_gated(x, torch.ones(8), residual=residual)
    assert total.dtype == torch.float32 and torch.equal(total, x.float() + residual)
    total.sum().backward()
    assert torch.equal(residual.grad, torch.ones(3, 8)) and torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"x": 3}, TypeError, "x is int"),
    ({"x": torch.zeros(())}, ValueError, r"x has shape \[\]"),
    ({"x": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "x has dtype int64"),
    ({"weight": torch.zeros(7)}, ValueError, r"weight has shape \[7\], expected \[D\] with D = 8 \(from x\)"),
    ({"z": torch.zeros(3, 8)}, ValueError, "z has shape"),
    ({"residual": torch.zeros(8)}, ValueError, "residual has shape"),
    ({"group_size": 3}, ValueError, "group_size is 3, expected a divisor of D = 8"),
    ({"group_size": 2.0}, TypeError, "group_size is float"),
    ({"group_size": 0}, ValueError, "group_size is 0"),
    ({"eps": -1.0}, ValueError, "eps is -1.0"),
    ({"eps": "small"}, TypeError, "eps is str, expected a float"),
    ({"eps": None}, TypeError, "eps is NoneType"),
    ({"norm_before_gate": 1}, TypeError, "norm_before_gate is int, expected True or False"),
    ({"eps": float("nan")}, ValueError, "eps is nan"),
    ({"weight": torch.zeros(8, device="meta")}, ValueError, "weight is on device meta"),
])
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        pyseq.rms_norm_gated(**({"x": torch.zeros(2, 8), "weight": torch.ones(8)} | arguments))
