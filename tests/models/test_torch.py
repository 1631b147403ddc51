"""Models under what PyTorch users put around them."""

import torch
from torch import func

IDS = torch.arange(18).reshape(2, 9) * 5 % 61


def gradients(model, logits):
    return torch.autograd.grad(logits.float().square().mean(), list(model.parameters()))


def test_compile_in_one_graph(tiny, tiny2, tiny7):
    rare = {"d_ssm": 32, "rmsnorm": False, "D_has_hdim": True, "dt_limit": (0.01, 0.1)}
    for model in (
        tiny(), tiny(layer_args={"mixer_rms_eps": 1e-6}, tie_embeddings=False), tiny2(), tiny2(layer_args=rare),
        tiny7(),
    ):  # fmt: skip
        torch._dynamo.reset()   # each model is a compilation of the same code, and there is a limit to them
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        expected, got = model(IDS), compiled(IDS)
        assert torch.equal(got.logits, expected.logits)
        for a, b in zip(gradients(model, got.logits), gradients(model, expected.logits), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-8)
        model.pack()
        with torch.no_grad():
            assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(IDS).logits, expected.logits)


def test_export(either):
    model = either()
    program = torch.export.export(model, (IDS,))
    assert torch.equal(program.module()(IDS).logits, model(IDS).logits)


def test_functional_gradient(either):
    model = either()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    got = func.grad(lambda p: func.functional_call(model, p, (IDS,)).logits.square().mean())(parameters)
    expected = gradients(model, model(IDS).logits)
    for a, b in zip(got.values(), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-8)


def test_autocast_trains_float32_weights(either):
    model = either()
    expected = model(IDS).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(IDS)
        grads = gradients(model, out.logits)
    assert all(s[1].dtype == torch.float32 for s in out.state)
    assert (out.logits - expected).abs().max() < 0.05 * expected.abs().max()
    for a, b in zip(grads, gradients(model, expected), strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.1 * b.norm()


