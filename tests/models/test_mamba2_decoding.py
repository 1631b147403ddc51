"""A Mamba-2 model's prefill, steps, padding, packing and generation against the whole."""

import pytest
import torch
from mamba2_files import IDS

from pyseq.models import state as states


def close(got, want, rtol=2e-5):
    assert (got - want).abs().max() <= rtol * want.abs().max()


def test_prefill_and_steps_equal_the_whole(tiny2):
    model = tiny2()
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
    close(torch.cat(parts, 1), whole.logits)
    for layer, want in zip(state, whole.state, strict=True):
        close(layer.ssd, want.ssd)
        close(layer.conv, want.conv)


def test_a_prompt_in_passes_is_the_prompt(tiny2, monkeypatch):
    from pyseq.models import generation

    model, mask = tiny2(), torch.ones_like(IDS)
    mask[1, :5] = 0
    monkeypatch.setattr(generation, "_CHUNK", 5)
    pieces = generation._prefill(model, IDS, None, mask)
    close(pieces.logits[:, 0], model(IDS, attention_mask=mask).logits[:, -1])


def test_left_padding_equals_each_row_alone(tiny2):
    model, mask = tiny2(), torch.ones_like(IDS)
    mask[1, :7] = 0
    with torch.no_grad():
        close(model(IDS, attention_mask=mask).logits[1:, 7:], model(IDS[1:, 7:]).logits)
    batch = model.generate(IDS, 12, attention_mask=mask, temperature=0)
    assert torch.equal(batch[1:, 12:], model.generate(IDS[1:, 7:], 12, temperature=0)[:, 5:])


def test_packed_documents_equal_each_alone(tiny2):
    model, ids = tiny2(), IDS.reshape(1, 24)
    with torch.no_grad():
        packed = model(ids, cu_seqlens=torch.tensor([0, 9, 9, 24]))
        close(packed.logits[:, :9], model(ids[:, :9]).logits)
        close(packed.logits[:, 9:], model(ids[:, 9:]).logits)
        close(packed.state[1].ssd[2:], model(ids[:, 9:]).state[1].ssd)
    assert not packed.state[0].ssd[1].any()


def test_steps_run_on_a_bfloat16_state(either):
    model = either()
    with torch.no_grad():
        state = model(IDS[:, :8]).state
        half = states.copy_(model.init_state(2, dtype=torch.bfloat16), state)
        for t in range(8, 12):
            want, state = model.step(IDS[:, t], state)
            got, half = model.step(IDS[:, t], half)
            close(got, want, 2e-2)
    assert half[0][1].dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"state .*bfloat16"):
        model(IDS, half)


def test_generation_goes_on_from_its_state(tiny2, tmp_path):
    model = tiny2()
    whole = model.generate(IDS, 20, temperature=0)
    ids, state = model.generate(IDS, 8, temperature=0, return_state=True)
    states.save(state, tmp_path / "state.safetensors")
    again = states.load(tmp_path / "state.safetensors", like=model.init_state(2))
    assert torch.equal(model.generate(ids[:, -1:], 12, temperature=0, state=again)[:, 1:], whole[:, 20:])
