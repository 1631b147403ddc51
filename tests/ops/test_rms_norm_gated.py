"""What is rms_norm_gated's own: golden values, and the errors of its arguments."""

import pytest
import torch

import pyseq
from pyseq import _library, reference, testing
from pyseq.testing import assert_close, gradients, on

BACKENDS = testing.backends(_library.REGISTRY["rms_norm_gated"])


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


# On a GPU a group has part of a warp, whole warps, or threads that read what exceeds their registers twice; whole,
# aligned vectors are single accesses. The bits must not tell.
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "cpu"])
@pytest.mark.parametrize("how", [{}, {"z": True}, {"z": True, "residual": True, "norm_before_gate": True}], ids=str)
@pytest.mark.parametrize(("rows", "groups", "size"), [
    (9, 3, 1), (5, 2, 7), (33, 2, 8), (6, 3, 40), (3, 2, 250), (5, 1, 512), (4, 2, 520), (2, 1, 4100), (5, 1, 8216),
    (2, 1, 8195),
])
def test_groups_of_every_size(rows, groups, size, how, backend):
    dim = groups * size
    eps = 0.5 if size == 1 else 1e-5   # with a small one the gradient would be all cancellation
    options = {"group_size": size, "norm_before_gate": how.get("norm_before_gate", False), "eps": eps}
    for k, dtype in enumerate(testing.DTYPES):
        torch.manual_seed(size)
        tensors = {"x": torch.randn(rows, dim).to(dtype), "weight": 1 + 0.1 * torch.randn(dim)}
        if how.get("z"):
            tensors["z"] = torch.randn(rows, dim).to(testing.DTYPES[k - 1])
        if how.get("residual"):
            tensors["residual"] = torch.randn(rows, dim).to(testing.DTYPES[k - 2])
        doubles = {n: t.double().requires_grad_() for n, t in tensors.items()}
        exact, exact_grads = gradients(lambda **a: reference.rms_norm_gated(**a, **options), doubles)
        results = []
        with on(backend) as device:
            for shift in (0, 3):
                leaves = {}
                for n, t in tensors.items():
                    wide = (*t.shape[:-1], dim + 8 * (shift > 0))
                    memory = torch.full(wide, float("nan"), device=device, dtype=t.dtype)
                    memory[..., shift : shift + dim] = t.to(device)
                    leaves[n] = memory[..., shift : shift + dim].requires_grad_()
                results.append(gradients(lambda **a: pyseq.rms_norm_gated(**a, **options), leaves))
        (y, grads), (shifted, shifted_grads) = results
        for a, b, e in zip(y, shifted, exact, strict=True):
            assert torch.equal(a, b)
            assert_close(a, e, "output")
        for name in grads:
            assert torch.equal(grads[name], shifted_grads[name]), name
            assert_close(grads[name], exact_grads[name], f"gradient of {name}", "gradient")


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "cpu"])
def test_more_groups_than_a_gpu_numbers_are_refused(backend):
    x = torch.ones(1, 1, device="cuda" if backend == "cuda" else "cpu").expand(2**32 - 127, 1)
    with pytest.raises(RuntimeError, match="takes up to 4294967168 groups, not 4294967169"), on(backend):
        pyseq.rms_norm_gated(x, torch.ones(1, device=x.device))


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
