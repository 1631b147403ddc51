"""Layers, models, generation and training make every tensor on the device of their weights, and read none of it back.

Shown on the meta device: an operation that meets a CPU tensor there, or wants a value, fails. A GPU is not needed.
"""

import contextlib

import pytest
import torch
from torch.utils._pytree import tree_leaves

import pyseq
from pyseq.layers import mamba
from pyseq.models import CausalLM, Config, generation
from pyseq.models.decoding import Decoding
from pyseq.train import Settings, loop
from pyseq.train.batches import Batch

META = torch.device("meta")
KINDS = {
    "mamba": {},
    "falcon": {"layer_args": {"mixer_rms_eps": 1e-6}},
    "mamba2": {"layer": "Mamba2", "layer_args": {"headdim": 8, "ngroups": 2}},
    "rwkv7": {"layer": "RWKV7", "layer_args": {"head_size": 8}},
}
by_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def model_of(options, **kind):
    layer_args = options.get("layer_args", {}) | ({} if options.get("layer") == "RWKV7" else {"d_state": 8})
    config = Config(d_model=32, n_layer=2, vocab_size=61, **{**options, "layer_args": layer_args})
    return CausalLM(config, device=META, **kind)


def ids(*shape):
    return torch.zeros(*shape, dtype=torch.int64, device=META)


def all_meta(*values):
    return all(t.device == META for t in tree_leaves(values) if isinstance(t, torch.Tensor))


@by_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward(options, dtype):
    model = model_of(options, dtype=dtype)
    out = model(ids(2, 7))
    packed = model(ids(1, 7), cu_seqlens=ids(3))
    assert all_meta(out, packed) and out.logits.shape == (2, 7, 64) and packed.state[0][1].shape[0] == 2
    (out.logits.sum() + packed.logits.sum()).backward()
    assert all_meta([p.grad for p in model.parameters()])


@by_kind
@pytest.mark.parametrize("fused", [False, True], ids=["op by op", "fused"])
def test_steps(options, fused, monkeypatch):
    monkeypatch.setattr(mamba, "runs_on_gpu", lambda t: fused)
    for dtype in (torch.float32, torch.bfloat16):
        model = model_of(options, dtype=dtype)
        with torch.inference_mode():
            state = model.init_state(2)
            logits, state = model.step(ids(2), state)
            assert all_meta(logits, state, model.stepper(state)(ids(2)))


@by_kind
@pytest.mark.parametrize("how", [
    {"temperature": 0},
    {"seed": 1, "top_k": 5, "repetition_penalty": 1.2},
    {"top_p": 0.9, "eos_token_id": [3, 4], "return_state": True},
])  # fmt: skip
def test_generation_asks_for_no_value(options, how, monkeypatch):
    monkeypatch.setattr(mamba, "runs_on_gpu", lambda t: True)
    monkeypatch.setattr(Decoding, "all_done", lambda run: False)
    assert all_meta(generation.generate(model_of(options), ids(2, 5), 20, **how))


@by_kind
def test_a_step_of_training(options, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())   # which has no meta device
    batch = Batch(
        inputs=torch.zeros(1, 12, dtype=torch.int64), targets=torch.zeros(1, 12, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 6, 9, 12]), first=torch.tensor([0, 1]), last=torch.tensor([0, 2]),
        continues=torch.tensor([True, False]),
    )  # fmt: skip
    run = loop.Run.__new__(loop.Run)
    run.settings = Settings(device="meta", steps=1, batch=2, length=6, carry_state=True)
    model = model_of(options)
    rows = model.init_state(2)
    loss, state = run._loss(model, batch, loop.carried_state(rows, batch))
    loss.backward()
    rows = loop.final_rows(state, batch)
    assert all_meta(loss, rows) and rows[0][1].shape[0] == 2
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("make", [
    pyseq.Mamba, lambda *a, **k: pyseq.Mamba2(*a, headdim=8, **k), lambda *a, **k: pyseq.RWKV7(*a, head_size=8, **k),
])  # fmt: skip
def test_a_layer_takes_its_device_and_keeps_it(make):
    layer = make(16, device=META)
    assert all_meta(list(layer.parameters()), layer.init_state(3), layer(torch.zeros(1, 4, 16, device=META)))
    assert {t.device.type for t in layer.init_state(3, device="cpu")} == {"cpu"}
