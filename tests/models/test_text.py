"""Bytes and tokenizer.json, whole and token by token."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pyseq.models.text import ByteTokenizer, JsonTokenizer, load_tokenizer

TEXT = "Grüße, 世界! \N{GRINNING FACE} a\u0301 end"


@pytest.fixture
def folder(tmp_path):
    """A byte-level tokenizer of 256 bytes, two merges and a special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate([*alphabet, "en", "end"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("e", "n"), ("en", "d")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def stream(tokenizer, ids):
    decoder = tokenizer.decoder()
    return [*(decoder.push(t) for t in ids), decoder.flush()]


def test_bytes():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert tokenizer.decode(torch.tensor([0xC3, 0xA9, 300, 65])) == "éA"
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert stream(tokenizer, [0xC3, 0xA9, 300, 0xE4, 0x41, 0xF0]) == ["", "é", "", "", "\ufffdA", "", "\ufffd"]
    with pytest.raises(ValueError, match="ids"):
        tokenizer.decode(torch.zeros(1, 2))


def test_json(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == 259
    ids = tokenizer.encode(TEXT)
    assert ids[-1] == 257 and tokenizer.decode(torch.tensor([*ids, 258])) == TEXT
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == TEXT and not any("\ufffd" in piece for piece in pieces)
    assert pieces.index("界") > 0


@hypothesis.settings(deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(st.lists(st.integers(0, 257), max_size=30))
def test_streamed_text_is_the_text(folder, ids):
    tokenizer = JsonTokenizer(folder / "tokenizer.json")
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)
    bytes_only = [t for t in ids if t < 256]
    assert "".join(stream(ByteTokenizer(), bytes_only)) == ByteTokenizer().decode(bytes_only)


def test_saved_beside_the_weights(folder, tiny, tmp_path):
    import pyseq

    model = tiny()
    model.tokenizer = load_tokenizer(folder)
    model.save_pretrained(tmp_path / "out")
    assert pyseq.from_pretrained(tmp_path / "out").tokenizer.encode(TEXT) == model.tokenizer.encode(TEXT)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xff", b"[" * 10_000])
def test_broken_tokenizer(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_no_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path) is None
