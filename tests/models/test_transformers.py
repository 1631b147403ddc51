"""Models written by transformers give its logits and its greedy text, and it reads what we write."""

import json

import pytest
import torch

import pyseq

OPTIONS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "biased": {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3},
    "odd": {"time_step_rank": 5, "expand": 3, "layer_norm_epsilon": 1e-3},
}
IDS = torch.arange(40).reshape(2, 20) * 7 % 96
of_mamba = pytest.mark.parametrize("theirs", ["mamba", "falcon_mamba"], indirect=True)
of_mamba2 = pytest.mark.parametrize("theirs", ["mamba2", "mamba2 of 3 groups"], indirect=True)


@pytest.mark.parametrize("option, shard", [*((o, "5GB") for o in OPTIONS), ("tied", "20KB"), ("untied", "20KB")])
def test_float32_logits_and_greedy_text(theirs, option, shard, tmp_path):
    their = theirs(**OPTIONS[option])
    their.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    our = pyseq.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = their(IDS).logits
        assert (our(IDS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    text = their.generate(IDS, max_new_tokens=16, do_sample=False, eos_token_id=None)
    assert torch.equal(our.generate(IDS, 16, temperature=0), text)


def test_bfloat16_is_as_close_to_float32_as_transformers_is(theirs, tmp_path):
    their = theirs().to(torch.bfloat16)
    their.save_pretrained(tmp_path)
    our = pyseq.from_pretrained(tmp_path)
    assert our.backbone.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16
    assert our.backbone.layers[0].mixer.A_log.dtype == our.backbone.norm_f.weight.dtype == torch.float32
    with torch.no_grad():
        half, ours = their(IDS).logits, our(IDS).logits
        exact = their.float()(IDS).logits
    assert ours.dtype == torch.float32
    assert (ours - exact).square().mean() <= 1.5 * (half - exact).square().mean()
    # Greedy text, teacher-forced: wherever float32 prefers a token by more than both errors, all three agree.
    top = exact.topk(2).values
    clear = top[..., 0] - top[..., 1] > 2 * torch.maximum((ours - exact).abs(), (half - exact).abs()).amax(-1)
    assert clear.float().mean() > 0.3
    assert torch.equal(ours.argmax(-1)[clear], half.argmax(-1)[clear])


def test_dtype_is_a_choice(theirs, tmp_path):
    their = theirs()
    their.save_pretrained(tmp_path)
    assert pyseq.from_pretrained(tmp_path, dtype=torch.bfloat16)(IDS).logits.dtype == torch.float32
    exact = pyseq.from_pretrained(tmp_path, dtype=torch.float64)(IDS).logits
    assert exact.dtype == torch.float64
    assert (their(IDS).logits - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_left_padding_equals_each_row_alone(theirs, tmp_path):
    their = theirs()
    their.save_pretrained(tmp_path)
    our = pyseq.from_pretrained(tmp_path)
    ids = IDS.clone()
    mask = torch.ones_like(ids)
    ids[1, :13] = 0
    mask[1, :13] = 0
    with torch.no_grad():
        logits = our(ids, attention_mask=mask).logits
        expected = their(IDS[1:, 13:]).logits
    assert (logits[1:, 13:] - expected).abs().max() <= 1e-5 * expected.abs().max()
    text = their.generate(IDS[1:, 13:], max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert torch.equal(our.generate(ids, 9, attention_mask=mask, temperature=0)[1:, 13:], text)


def test_transformers_reads_what_we_write(theirs, tmp_path):
    their = theirs(tie_word_embeddings=False)
    their.save_pretrained(tmp_path / "theirs")
    our = pyseq.from_pretrained(tmp_path / "theirs")
    our.save_pretrained(tmp_path / "ours")
    again = theirs.Model.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, their(IDS).logits)
        assert torch.equal(pyseq.from_pretrained(tmp_path / "ours")(IDS).logits, our(IDS).logits)


def edit(folder, **fields):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@of_mamba
def test_traps_that_are_no_errors(theirs, tmp_path):
    theirs().save_pretrained(tmp_path)
    expected = pyseq.from_pretrained(tmp_path)(IDS).logits
    falcon = "mixer_rms_eps" in json.loads((tmp_path / "config.json").read_text())
    edit(tmp_path, expand=16)  # an explicit intermediate_size wins, as FalconMamba-7B needs
    edit(tmp_path, time_step_rank="auto", tie_word_embeddings=..., hidden_act=..., mixer_rms_eps=...)
    edit(tmp_path, time_step_limit=[0.0, float("inf")], something_else={"a": 1})
    model = pyseq.from_pretrained(tmp_path)
    assert torch.equal(model(IDS).logits, expected)
    assert (model.backbone.layers[0].mixer.mixer_rms_eps is not None) == falcon


def test_end_tokens_come_from_the_checkpoint(theirs, tmp_path):
    their = theirs(eos_token_id=5, pad_token_id=3)
    their.save_pretrained(tmp_path)
    assert pyseq.from_pretrained(tmp_path).config.eos_token_id == 5
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    config = pyseq.from_pretrained(tmp_path).config
    assert config.eos_token_id == [7, 9] and config.pad_token_id == 3


LIES = [
    ("hidden_size", 64),
    ("num_hidden_layers", 10**9),
    ("vocab_size", 10**12),
    ("state_size", "8"),
    ("conv_kernel", 5),
    ("intermediate_size", -1),
    ("use_bias", True),
    ("hidden_act", "gelu"),
    ("tie_word_embeddings", False),
    ("layer_norm_epsilon", "tiny"),
    ("layer_norm_epsilon", float("nan")),
    ("model_type", "zamba"),
    ("model_type", ["mamba"]),
    ("eos_token_id", "</s>"),
]


@of_mamba
@pytest.mark.parametrize("field, value", [
    *LIES, ("time_step_rank", 4), ("time_step_rank", "all"), ("model_type", "mamba2"),
])  # fmt: skip
def test_lying_config_is_refused(theirs, field, value, tmp_path):
    theirs().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    edit(tmp_path, **{field: value})
    name = {"layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tied"}.get(field, field)
    with pytest.raises(ValueError, match=name):
        pyseq.from_pretrained(tmp_path)


@of_mamba
@pytest.mark.parametrize("expand", [3, 1e308, 10**400, float("nan"), "2", None, -2])
def test_expand_must_agree_where_it_counts(theirs, expand, tmp_path):
    theirs().save_pretrained(tmp_path)
    edit(tmp_path, intermediate_size=..., expand=expand)
    with pytest.raises(ValueError, match="expand"):
        pyseq.from_pretrained(tmp_path)


@of_mamba2
@pytest.mark.parametrize("field, value", [
    *LIES, ("state_size", 16), ("state_size", 10**12), ("state_size", -8), ("n_groups", 6), ("n_groups", None),
    ("n_groups", 0), ("num_heads", 6), ("head_dim", 16), ("head_dim", True), ("expand", 3), ("expand", 10**400),
    ("time_step_limit", [0.0]), ("time_step_limit", "Infinity"), ("time_step_limit", [0.0, "many"]),
    ("time_step_limit", [1.0, 0.5]), ("time_step_limit", [0.0, float("nan")]), ("time_step_limit", [-1.0, 1.0]),
    ("time_step_limit", [0.0, 10**400]), ("time_step_limit", [float("inf"), float("inf")]),
    ("time_step_limit", [0.0, {"__float__": 3, "more": 1}]), ("model_type", "mamba"), ("model_type", "bamba"),
])  # fmt: skip
def test_lying_config_of_mamba2_is_refused(theirs, field, value, tmp_path):
    test_lying_config_is_refused(theirs, field, value, tmp_path)


@of_mamba2
def test_groups_and_state_are_known_by_their_product_alone(theirs, tmp_path):
    """A config with both, which agree with the tensors in their product, is believed, as transformers believes it."""
    theirs(n_groups=2, state_size=6).save_pretrained(tmp_path)
    edit(tmp_path, n_groups=6, state_size=2)
    with torch.no_grad():
        expected = theirs.Model.from_pretrained(tmp_path)(IDS).logits
        assert (pyseq.from_pretrained(tmp_path)(IDS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


INFINITE = ['[0.0, Infinity]', '[0.0, "Infinity"]', '[0, "inf"]', '[0.0, {"__float__": "Infinity"}]', "null"]


@of_mamba2
@pytest.mark.parametrize("spelling", INFINITE)
def test_spellings_of_an_infinite_limit(theirs, spelling, tmp_path):
    theirs().save_pretrained(tmp_path)
    expected = pyseq.from_pretrained(tmp_path)(IDS).logits
    edit(tmp_path, time_step_limit=json.loads(spelling))
    for _ in range(2):
        model = pyseq.from_pretrained(tmp_path)
        assert "dt_limit" not in model.config.layer_args and torch.equal(model(IDS).logits, expected)
        edit(tmp_path, time_step_limit=...)


@of_mamba2
@pytest.mark.parametrize("limit", [(0.0, 0.05), (0.02, 0.05), (0.02, float("inf"))])
def test_limits_go_there_and_back(theirs, limit, tmp_path):
    their = theirs(time_step_limit=limit)
    their.save_pretrained(tmp_path / "theirs")
    our = pyseq.from_pretrained(tmp_path / "theirs")
    our.save_pretrained(tmp_path / "ours")
    again = theirs.Model.from_pretrained(tmp_path / "ours")
    assert tuple(again.config.time_step_limit) == limit
    assert our.backbone.layers[1].mixer.dt_limit == limit
    with torch.no_grad():
        expected, free = their(IDS).logits, pyseq.from_pretrained(tmp_path / "ours")(IDS).logits
        assert torch.equal(again(IDS).logits, expected) and torch.equal(our(IDS).logits, free)
        assert (free - expected).abs().max() <= 1e-5 * expected.abs().max()
        state = our.init_state(2)   # transformers' own step forgets the limit: a step of ours does not
        stepped = torch.stack([our.step(IDS[:, t], state)[0] for t in range(20)], 1)
        assert (stepped - expected).abs().max() <= 1e-5 * expected.abs().max()


@of_mamba2
def test_norm_before_gate_in_a_config_means_nothing(theirs, tmp_path):
    """Mamba-Codestral's says true. transformers never read it, and gates first."""
    theirs().save_pretrained(tmp_path)
    expected = pyseq.from_pretrained(tmp_path)(IDS).logits
    edit(tmp_path, norm_before_gate=True, rms_norm=True, time_step_rank=3, time_step_min=0.5, chunk_size=8)
    assert torch.equal(pyseq.from_pretrained(tmp_path)(IDS).logits, expected)
