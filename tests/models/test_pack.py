"""A packed model computes, saves, loads and trains on like the plain one, and holds no weight twice."""

import copy

import pytest
import torch

import pyseq

IDS = torch.arange(14).reshape(2, 7) * 5 % 61


def nbytes(model):
    plain = sum(p.nbytes for p in model.parameters())
    return plain + sum(m.packed.panels.nbytes for m in model.modules() if getattr(m, "packed", None) is not None)


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def model(request, either):
    return either(dtype=request.param, d_model=64, vocab_size=128)


@pytest.mark.parametrize("tie", [True, False])
def test_same_numbers(either, tie):
    plain = either(tie_embeddings=tie)
    packed = copy.deepcopy(plain).pack()
    with torch.no_grad():
        assert torch.equal(packed(IDS).logits, plain(IDS).logits)
    assert torch.equal(packed.generate(IDS, 20, temperature=0), plain.generate(IDS, 20, temperature=0))


def test_bfloat16_is_as_close(either):
    plain = either(dtype=torch.bfloat16)
    exact = copy.deepcopy(plain).float()(IDS).logits
    packed = copy.deepcopy(plain).pack()
    with torch.no_grad():
        error, reference = packed(IDS).logits - exact, plain(IDS).logits - exact
    assert error.square().mean() <= 1.5 * reference.square().mean()


def test_nothing_is_held_twice(model):
    before = nbytes(model)
    model.pack().pack()
    assert nbytes(model) <= 1.3 * before  # narrow weights are padded: 36 rows of x_proj to 64, 4 columns of dt_proj
    plain = [name for name, p in model.named_parameters() if p.dim() == 2 and name.endswith(".weight")]
    assert plain == ([] if model.lm_head is None else ["backbone.embeddings.weight"])  # looked up, not multiplied


def test_state_dict_and_saving(model, tmp_path):
    expected = {name: t.clone() for name, t in model.state_dict().items()}
    model.pack()
    got = model.state_dict()
    assert set(got) == set(expected) and all(torch.equal(got[name], t) for name, t in expected.items())
    model.save_pretrained(tmp_path)
    read = pyseq.from_pretrained(tmp_path)
    assert all(torch.equal(t, expected[name]) for name, t in read.state_dict().items())
    other = {name: t + 1 for name, t in expected.items()}
    model.load_state_dict(other)
    assert all(torch.equal(t, other[name]) for name, t in model.state_dict().items())


def test_training_mode_unpacks(model):
    expected = model(IDS).logits
    assert not model.pack().training
    assert torch.equal(model.train()(IDS).logits, expected)
    model(IDS).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_cast_after_packing(tiny):
    plain = tiny()
    packed = copy.deepcopy(plain).pack().to(torch.bfloat16)
    assert packed.backbone.layers[0].mixer.in_proj.packed.dtype == torch.bfloat16
    cast = plain.to(torch.bfloat16)
    assert all(torch.equal(t, cast.state_dict()[name]) for name, t in packed.state_dict().items())


def test_types_without_a_packed_form_stay_plain(tiny):
    model = tiny(dtype=torch.float64)
    expected = model(IDS).logits
    assert torch.equal(model.pack()(IDS).logits, expected)
    assert model.generate(IDS, 3, temperature=0).shape == (2, 10)
