"""An RWKV-7 model's prefill, steps, padding, packing, generation and training against the whole."""

import copy

import pytest
import torch
from rwkv7_files import IDS

from pyseq.models import CausalLM, Config
from pyseq.models import state as states


def close(got, want, rtol=2e-5):
    assert (got - want).abs().max() <= rtol * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("packed", [False, True])
def test_prefill_and_steps_equal_the_whole(tiny7, dtype, packed):
    model = tiny7(dtype=dtype)
    model = model.pack() if packed else model
    rtol = 3e-2 if dtype == torch.bfloat16 else 2e-5
    with torch.no_grad():
        whole = model(IDS)
        logits, state = model(IDS[:, :5])
        parts = [logits]
        other = states.clone(state)
        stepper = model.stepper(other)
        for t in range(5, 12):
            logits, state = model.step(IDS[:, t], state)
            assert torch.equal(stepper(IDS[:, t]), logits)
            parts.append(logits[:, None])
    close(torch.cat(parts, 1), whole.logits, rtol)
    for layer, want, looped in zip(state, whole.state, other, strict=True):
        for got, expected, same in zip(layer, want, looped, strict=True):
            close(got, expected, rtol)
            assert torch.equal(got, same)


def test_packing_changes_nothing(tiny7):
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny7(dtype=dtype)
        with torch.no_grad():
            want, copied = model(IDS).logits, copy.deepcopy(model)
            decays = [getattr(p, "_no_weight_decay", False) for p in model.parameters()]
            assert torch.equal(model.pack()(IDS).logits, want)
            assert model.backbone.layers[1].att.w2.packed is not None
        for (name, p), (_, q) in zip(model.unpack().named_parameters(), copied.named_parameters(), strict=True):
            assert torch.equal(p, q) and p.dtype == q.dtype, name
        assert [getattr(p, "_no_weight_decay", False) for p in model.parameters()] == decays


def test_left_padding_equals_each_row_alone(tiny7):
    model, mask = tiny7(), torch.ones_like(IDS)
    mask[1, :7] = 0
    with torch.no_grad():
        padded = model(IDS, attention_mask=mask)
        alone = model(IDS[1:, 7:])
        close(padded.logits[1:, 7:], alone.logits)
        for got, want in zip(padded.state, alone.state, strict=True):
            for a, b in zip(got, want, strict=True):
                close(a[1:], b)
    batch = model.generate(IDS, 12, attention_mask=mask, temperature=0)
    assert torch.equal(batch[1:, 12:], model.generate(IDS[1:, 7:], 12, temperature=0)[:, 5:])


def test_packed_documents_equal_each_alone(tiny7):
    model, ids = tiny7(), IDS.reshape(1, 24)
    with torch.no_grad():
        packed = model(ids, cu_seqlens=torch.tensor([0, 9, 9, 24]))
        close(packed.logits[:, :9], model(ids[:, :9]).logits)
        close(packed.logits[:, 9:], model(ids[:, 9:]).logits)
        close(packed.state[1].wkv[2:], model(ids[:, 9:]).state[1].wkv)
    assert not packed.state[0].wkv[1].any() and not packed.state[0].time[1].any()


def test_a_prompt_in_passes_is_the_prompt(tiny7, monkeypatch):
    from pyseq.models import generation

    model, mask = tiny7(), torch.ones_like(IDS)
    mask[1, :5] = 0
    monkeypatch.setattr(generation, "_CHUNK", 5)
    pieces = generation._prefill(model, IDS, None, mask)
    close(pieces.logits[:, 0], model(IDS, attention_mask=mask).logits[:, -1])


def test_generation_goes_on_from_its_state(tiny7, tmp_path):
    model = tiny7().pack()
    whole = model.generate(IDS, 20, temperature=0)
    ids, state = model.generate(IDS, 8, temperature=0, return_state=True)
    states.save(state, tmp_path / "state.safetensors")
    again = states.load(tmp_path / "state.safetensors", like=model.init_state(2))
    assert torch.equal(model.generate(ids[:, -1:], 12, temperature=0, state=again)[:, 1:], whole[:, 20:])


def test_steps_run_on_a_bfloat16_state(tiny7):
    model = tiny7()
    with torch.no_grad():
        state = model(IDS[:, :8]).state
        half = states.copy_(model.init_state(2, dtype=torch.bfloat16), state)
        want, _ = model.step(IDS[:, 8], state)
        got, half = model.step(IDS[:, 8], half)
        close(got, want, 5e-2)
    assert half[0].wkv.dtype == half[0].time.dtype == torch.bfloat16


@pytest.mark.parametrize("tie", [False, True])
def test_a_new_model_is_trained(tie):
    """Everything has a gradient after one step: before it, what a layer adds to x is zero."""
    torch.manual_seed(0)
    model = CausalLM(Config(32, 3, 61, "RWKV7", {"head_size": 16}, tie_embeddings=tie))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        logits = model(IDS[:, :-1]).logits[..., :61]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_beginning():
    model = CausalLM(Config(128, 2, 61, "RWKV7", tie_embeddings=False))
    layer, head = model.backbone.layers[1], model.lm_head.weight.detach()
    assert model.backbone.embeddings.weight.abs().max() <= 1e-4
    for weight, gain in ((layer.att.receptance.weight, 1), (layer.att.key.weight, 0.1), (layer.ffn.key.weight.mT, 1)):
        close(weight.detach() @ weight.detach().mT, gain**2 * torch.eye(128))
    close(head @ head.mT, 0.25 * torch.eye(64))
    assert not layer.att.output.weight.any() and not layer.ffn.value.weight.any()
    half = CausalLM(Config(128, 2, 61, "RWKV7"), dtype=torch.bfloat16)
    assert half.backbone.layers[1].att.value.weight.std() > 0.05
