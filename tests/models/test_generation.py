"""Generation: what it returns, where it stops, and that a state is a value one can go back to."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from pyseq.models import ByteTokenizer
from pyseq.models import state as states

IDS = torch.arange(14).reshape(2, 7) * 5 % 61


def greedy(model, ids, n):
    """The whole sequence again for every token."""
    for _ in range(n):
        logits = model(ids).logits[:, -1, : model.config.vocab_size]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("layer_args", [{}, {"mixer_rms_eps": 1e-6}])
def test_greedy(tiny, layer_args):
    model = tiny(layer_args=layer_args)
    assert torch.equal(model.generate(IDS, 20, temperature=0), greedy(model, IDS, 20))
    assert torch.equal(model.generate(IDS, 0), IDS)
    assert torch.equal(model.generate(IDS.int(), 3, temperature=0), greedy(model, IDS, 3))


def test_seed(tiny):
    model = tiny()
    torch.manual_seed(5)
    untouched = torch.random.get_rng_state()
    first, again, other = (model.generate(IDS, 30, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(model.generate(IDS, 30), model.generate(IDS, 30))
    assert torch.equal(torch.random.get_rng_state(), untouched)


def test_padding_of_the_vocabulary_is_never_drawn(tiny):
    model = tiny()
    with torch.no_grad():
        model.backbone.embeddings.weight[61:] = 100 * model.backbone.norm_f.weight
    assert model(IDS).logits.argmax(-1).max() >= 61
    for temperature in (0, 5.0):
        assert model.generate(IDS, 40, temperature=temperature, repetition_penalty=1.1, seed=0).max() < 61


def test_left_padding(tiny):
    model = tiny()
    rows = [IDS[0], IDS[1, 4:]]
    ids = torch.stack([rows[0], torch.cat([torch.full((4,), 60), rows[1]])])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for penalty in (1.0, 1.3):
        batch = model.generate(ids, 12, attention_mask=mask, temperature=0, repetition_penalty=penalty)
        for row, prompt in enumerate(rows):
            alone = model.generate(prompt[None], 12, temperature=0, repetition_penalty=penalty)
            assert torch.equal(batch[row, -12:], alone[0, -12:])


def test_forward_with_padding_touches_no_state(tiny):
    model = tiny()
    start = model(IDS).state
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]])
    out = model(IDS, start, attention_mask=mask)
    alone = model(IDS[:1, 3:], states.select(start, [0]))
    assert torch.equal(out.logits[:1, 3:], alone.logits)
    for got, want, before in zip(out.state, alone.state, start, strict=True):
        assert torch.equal(got.scan[:1], want.scan) and torch.equal(got.scan[1], before.scan[1])
        assert torch.equal(got.conv[:1], want.conv) and torch.equal(got.conv[1], before.conv[1])


def test_packed_equals_separate_bit_for_bit(tiny):
    model = tiny()
    out = model(IDS.reshape(1, 14), cu_seqlens=torch.tensor([0, 7, 14]))
    separate = model(IDS)
    assert torch.equal(out.logits.reshape(2, 7, -1), separate.logits)
    assert torch.equal(out.state[1].scan, separate.state[1].scan)


def test_chunks_and_steps_equal_the_whole_bit_for_bit(tiny):
    model = tiny()
    with torch.no_grad():
        whole = model(IDS)
        first = model(IDS[:, :3])
        second = model(IDS[:, 3:], first.state)
        assert torch.equal(torch.cat([first.logits, second.logits], 1), whole.logits)
        state = model.init_state(2)
        stepper = model.stepper(model.init_state(2))
        for t in range(7):
            logits, state = model.step(IDS[:, t], state)
            assert torch.equal(logits, whole.logits[:, t]) and torch.equal(stepper(IDS[:, t]), logits)
        assert torch.equal(model(IDS, logits_to_keep=2).logits, whole.logits[:, -2:])


def test_roll_back_and_generate_the_same_again(tiny):
    model = tiny()
    ids, point = model.generate(IDS, 5, seed=1, return_state=True)
    saved = states.clone(point)
    new = torch.cat([ids[:, -1:], torch.tensor([[3], [4]])], 1)
    first = model.generate(new, 20, seed=2, state=point)
    model.generate(IDS[:, :2], 20, seed=3, state=point)
    assert all(torch.equal(a, b) for s, t in zip(point, saved, strict=True) for a, b in zip(s, t, strict=True))
    assert torch.equal(model.generate(new, 20, seed=2, state=point), first)
    whole = model.generate(torch.cat([ids, new[:, 1:]], 1), 20, temperature=0)
    assert torch.equal(model.generate(new, 20, temperature=0, state=point), whole[:, ids.shape[1] - 1 :])


@pytest.mark.parametrize("n", [0, 1, 6])
def test_go_on_where_generation_stopped(tiny, n):
    model = tiny()
    mask = torch.ones_like(IDS)
    mask[1, :6] = 0
    ids, state = model.generate(IDS, n, temperature=0, attention_mask=mask, return_state=True)
    more = model.generate(ids[:, -1:], 9, temperature=0, state=state)
    whole = model.generate(IDS, n + 9, temperature=0, attention_mask=mask)
    assert torch.equal(torch.cat([ids, more[:, 1:]], 1), whole)


def test_returned_state_ends_where_its_row_does(tiny):
    model = tiny()
    free = model.generate(IDS, 12, temperature=0)
    stop = free[0, 7 + 4].item()
    ids, state = model.generate(IDS, 12, temperature=0, eos_token_id=stop, return_state=True)
    for row in range(2):
        new = ids[row, 7:].tolist()
        length = 7 + (new.index(stop) + 1 if stop in new else len(new))
        want = model(ids[row : row + 1, : length - 1]).state
        for got, expected in zip(states.select(state, [row]), want, strict=True):
            assert torch.equal(got.scan, expected.scan) and torch.equal(got.conv, expected.conv)
    model(IDS, state)[0].sum().backward()  # not an inference tensor


def test_end_tokens(tiny):
    model = tiny(pad_token_id=60)
    free = model.generate(IDS, 12, temperature=0)
    stop = free[0, 9].item()
    ids = model.generate(IDS, 12, temperature=0, eos_token_id=[stop, stop])
    at = free[0, 7:].tolist().index(stop) + 7
    assert torch.equal(ids[0, : at + 1], free[0, : at + 1]) and (ids[0, at + 1 :] == 60).all()
    assert model.generate(IDS[:1], 12, temperature=0, eos_token_id=stop).shape[1] == at + 1
    with pytest.raises(ValueError, match="config"):
        model.generate(IDS, 1, eos_token_id="config")
    named = tiny(eos_token_id=stop)
    assert named.generate(IDS[:1], 12, temperature=0, eos_token_id="config").shape[1] == at + 1
    assert named.generate(IDS[:1], 12, temperature=0).shape[1] == 19


def test_stop_sequences_and_strings(tiny):
    model = tiny(vocab_size=256)
    free = model.generate(IDS[:1], 30, temperature=0)[0]
    pair = free[7 + 10 : 7 + 12].tolist()
    end = next(i for i in range(8, 38) if free[i - 1 : i + 1].tolist() == pair) + 1
    assert model.generate(IDS[:1], 30, temperature=0, stop=[pair])[0].tolist() == free[:end].tolist()
    assert model.generate(IDS[:1], 30, temperature=0, stop=pair)[0].tolist() == free[:end].tolist()
    with pytest.raises(ValueError, match="tokenizer"):
        tiny().generate(IDS, 1, stop="x")
    with torch.no_grad():
        model.backbone.embeddings.weight[128:] = 0  # ASCII, as good as always
    text = ByteTokenizer().decode(model.generate(IDS[:1], 30, temperature=0)[0, 7:])
    stop = text[4:6]
    got = ByteTokenizer().decode(model.generate(IDS[:1], 30, temperature=0, stop=["never", stop])[0, 7:])
    assert got.endswith(stop) and stop not in got[:-1]


def test_stream_sees_every_token(tiny):
    model = tiny()
    seen = []
    ids = model.generate(IDS, 9, seed=0, stream=seen.append)
    assert torch.equal(torch.stack(seen, 1), ids[:, 7:])


def test_repetition_penalty_forbids_in_the_limit(tiny):
    ids = tiny().generate(IDS[:1], 40, temperature=0, repetition_penalty=1e9)
    new = ids[0, 7:].tolist()
    assert len(set(new)) == len(new) and not set(new) & set(IDS[0].tolist())


def test_nan_is_an_error(tiny):
    model = tiny()
    with torch.no_grad():
        model.backbone.norm_f.weight.fill_(float("nan"))
    for temperature in (0, 1):
        with pytest.raises(ValueError, match="finite"):
            model.generate(IDS, 2, temperature=temperature)


@pytest.mark.parametrize(
    "name, options",
    [
        ("max_new_tokens", {"max_new_tokens": -1}),
        ("max_new_tokens", {"max_new_tokens": 2.0}),
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": float("nan")}),
        ("temperature", {"temperature": "hot"}),
        ("top_k", {"top_k": 0}),
        ("top_k", {"top_k": True}),
        ("top_p", {"top_p": 0.0}),
        ("top_p", {"top_p": 1.1}),
        ("repetition_penalty", {"repetition_penalty": 0}),
        ("eos_token_id", {"eos_token_id": "end"}),
        ("eos_token_id", {"eos_token_id": [1, 99]}),
        ("stop", {"stop": [""]}),
        ("stop", {"stop": [[]]}),
        ("input_ids", {"input_ids": torch.zeros(2, 0, dtype=torch.int64)}),
        ("input_ids", {"input_ids": torch.zeros(3, dtype=torch.int64)}),
        ("input_ids", {"input_ids": torch.zeros(1, 3)}),
        ("input_ids", {"input_ids": torch.full((1, 3), 64)}),
        ("input_ids", {"input_ids": torch.full((1, 3), -1)}),
        ("input_ids", {"input_ids": [[1, 2]]}),
        ("attention_mask", {"attention_mask": torch.zeros(2, 7)}),
        ("attention_mask", {"attention_mask": torch.zeros(2, 7, dtype=torch.int64)}),
        ("attention_mask", {"attention_mask": torch.ones(2, 6, dtype=torch.int64)}),
        ("attention_mask", {"attention_mask": torch.tensor([[1] * 7, [1, 1, 1, 1, 1, 1, 0]])}),
        ("attention_mask", {"attention_mask": torch.tensor([[1] * 7, [0, 1, 0, 1, 1, 1, 1]])}),
        ("attention_mask", {"attention_mask": torch.full((2, 7), 2)}),
        ("state", {"state": ()}),
    ],
)
def test_wrong_arguments_are_named(tiny, name, options):
    with pytest.raises((ValueError, TypeError), match=name):
        tiny().generate(**{"input_ids": IDS, "max_new_tokens": 1, **options})


def test_forward_arguments_are_named(tiny):
    model = tiny()
    mask = torch.ones_like(IDS)
    for name, options in {
        "logits_to_keep": {"logits_to_keep": 0},
        "cu_seqlens": {"attention_mask": mask, "cu_seqlens": torch.tensor([0, 7])},
        "state": {"state": model.init_state(2)[:1]},
    }.items():
        with pytest.raises(ValueError, match=name):
            model(IDS, **options)


@hypothesis.settings(deadline=None, max_examples=25, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(
    temperature=st.floats(0, 1e30) | st.just(0),
    top_k=st.none() | st.integers(1, 100),
    top_p=st.none() | st.floats(1e-30, 1),
    penalty=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**31),
)
def test_any_legal_options_give_legal_tokens(tiny, temperature, top_k, top_p, penalty, seed):
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": penalty, "seed": seed}
    model = tiny()
    ids = model.generate(IDS, 3, **options)
    assert ids.shape == (2, 10) and ids.min() >= 0 and ids.max() < 61
    assert torch.equal(model.generate(IDS, 3, **options), ids)
