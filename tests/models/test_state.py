"""A state can be cloned, picked from, kept in a file and put back."""

import pytest
import torch
from safetensors.torch import save_file

from pyseq.models import state as states

IDS = torch.arange(21).reshape(3, 7)


def same(a, b):
    return all(torch.equal(s, t) for left, right in zip(a, b, strict=True) for s, t in zip(left, right, strict=True))


def test_clone_shares_nothing(tiny):
    state = tiny()(IDS).state
    copy = states.clone(state)
    assert same(state, copy) and not copy[0].scan.requires_grad
    copy[0].scan.zero_()
    assert state[0].scan.any()


def test_rows(tiny):
    model = tiny()
    state = model(IDS).state
    for rows in ([2, 0, 2], torch.tensor([2, 0, 2])):
        assert same(states.select(state, rows), model(IDS[[2, 0, 2]]).state)
    mask = torch.tensor([True, False, True])
    picked = states.select(state, mask)
    assert torch.equal(picked[1].conv, state[1].conv[mask])


def test_copy_in_place(tiny):
    model = tiny()
    with torch.no_grad():
        state, other = model(IDS).state, model(IDS + 1).state
        target = states.clone(state)
        states.copy_(target, other, torch.tensor([False, True, False]))
        assert same(states.select(target, [0, 2]), states.select(state, [0, 2]))
        assert same(states.select(target, [1]), states.select(other, [1]))
        assert same(states.copy_(target, state), state)
    with pytest.raises(ValueError, match="source"):
        states.copy_(target, states.select(state, [0]))
    with pytest.raises(ValueError, match="source"):
        states.copy_(target, state[:1])


def test_file(tiny, tmp_path):
    model = tiny()
    state = model(IDS).state
    states.save(state, tmp_path / "point.safetensors")
    assert same(states.load(tmp_path / "point.safetensors", model.init_state(1)), state)
    layer = model.backbone.layers[0].mixer
    states.save(state[0], tmp_path / "layer.safetensors")
    assert torch.equal(states.load(tmp_path / "layer.safetensors", layer.init_state(1)).scan, state[0].scan)


def test_wrong_file(tiny, tmp_path):
    model, path = tiny(), tmp_path / "point.safetensors"
    like = model.init_state(1)
    states.save(tiny(n_layer=3).init_state(2), path)
    with pytest.raises(ValueError, match="point"):
        states.load(path, like)
    states.save(tiny(layer_args={"d_state": 4}).init_state(2), path)
    with pytest.raises(ValueError, match="shape"):
        states.load(path, like)
    save_file({"[0].conv": torch.tensor(1.0)}, path)
    with pytest.raises(ValueError, match="point"):
        states.load(path, like)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="point"):
        states.load(path, like)
