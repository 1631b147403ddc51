"""The World vocabulary: its file, greedy encoding, bytes that are no UTF-8, token by token, and where it is found."""

import sys

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from rwkv7_files import authors, write

import pyseq
from pyseq.models import WorldTokenizer, convert_checkpoint, world
from pyseq.models.text import load_tokenizer

WORDS = ["the", " the", "then", "\n\n", "'\"", "\\'", "é", "世界", "\u2028", "\U0001f600", "a\tb", "aaaa", "aa"]
BYTES = [b"\xe4\xb8", b"\xf0\x9f\x98", b"\xff\xfe\x00"]


def lines():
    """As the file is written: 256 bytes, then words as literals of str, and of bytes where they are no text."""
    one = [bytes([i]) for i in range(256)]
    tokens = [chr(i) if i < 128 else b for i, b in enumerate(one)] + WORDS + BYTES
    size = [len(t.encode()) if isinstance(t, str) else len(t) for t in tokens]
    return [f"{i} {t!r} {n}" for i, (t, n) in enumerate(zip(tokens, size, strict=True), 1)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("world") / "vocab.txt"
    path.write_text("\n".join(lines()) + "\n", encoding="utf-8", newline="")
    return WorldTokenizer(path)


def ident(tokenizer, token):
    return tokenizer.encode_bytes(token)[0]


def test_the_longest_that_fits(tokenizer):
    assert tokenizer.vocab_size == 1 + 256 + len(WORDS) + len(BYTES)
    the, then, aa, aaaa = (ident(tokenizer, t) for t in (b"the", b"then", b"aa", b"aaaa"))
    assert tokenizer.encode("thethen") == [the, then]
    assert tokenizer.encode("aaaaaaa") == [aaaa, aa, 1 + ord("a")]   # 7 = 4 + 2 + 1
    assert tokenizer.encode("") == []
    assert tokenizer.encode("世") == [ident(tokenizer, b"\xe4\xb8"), 1 + 0x96]   # half of the character is a token
    assert len(tokenizer.encode("世界")) == 1 and len(tokenizer.encode("\u2028'\"\\'\n\n")) == 4


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text(st.sampled_from([*"athen 'é世界\n", "\U0001f600", "\u2028"]) | st.characters(codec="utf-8")))
def test_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(torch.tensor(ids, dtype=torch.int64)) == text
    decoder = tokenizer.decoder()
    pieces = [*(decoder.push(t) for t in ids), decoder.flush()]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces).replace("\ufffd" if "\ufffd" in text else "", "")


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(st.integers(-3, 300), max_size=20))
def test_any_ids_decode(tokenizer, ids):
    raw = tokenizer.decode_bytes(ids)
    assert tokenizer.decode(ids) == raw.decode("utf-8", errors="replace")
    decoder = tokenizer.decoder()
    assert "".join([*(decoder.push(t) for t in ids), decoder.flush()]) == tokenizer.decode(ids)
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(raw)) == raw


def test_what_is_no_text(tokenizer):
    assert tokenizer.decode([1 + 0xE4]) == "\ufffd" and tokenizer.decode([0, 10**6]) == ""
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"
    decoder = tokenizer.decoder()
    half = ident(tokenizer, b"\xf0\x9f\x98")
    assert [decoder.push(half), decoder.push(1 + 0x80), decoder.push(half), decoder.flush()] == [
        "", "\U0001f600", "", "\ufffd",
    ]  # fmt: skip


@pytest.mark.parametrize("line, word", [
    ("1 'a'", "line 1"), ("a 'a' 1", "line 1"), ("1 'a' 2", "1 bytes, but the line says 2"), ("1 '' 0", "0 bytes"),
    ("1 [1] 1", "literal"), ("1 __import__('os') 1", "literal"), ("1 'a'*9 9", "literal"), ("1 'é' 1", "2 bytes"),
    ("1 b'é' 2", "literal"), ("1 '\\x4' 1", "literal"), ("1 'a' 1\n1 'b' 1", "line 2: id 1 is there twice"),
    ("1 'a' 1\n2 b'a' 1", "two ids"), ("", "no line"), ("1 '" + "a" * 5000 + "' 5000", "expected"),
    ("1 '\\ud800' 3", "literal"), ("12345678 'a' 1", "expected"), ("1 " + "(" * 4000 + " 1", "expected"),
])  # fmt: skip
def test_broken_files(line, word, tmp_path):
    path = tmp_path / "v.txt"
    path.write_text(line, encoding="utf-8", newline="")
    with pytest.raises(ValueError, match=word):
        WorldTokenizer(path)


def test_more_broken_files(tmp_path, monkeypatch):
    path = tmp_path / "v.txt"
    path.write_bytes(b"1 '\xff' 1")
    with pytest.raises(ValueError, match="not a vocabulary"):
        WorldTokenizer(path)
    monkeypatch.setattr(world, "MAX_BYTES", 5)
    with pytest.raises(ValueError, match="too long"):
        WorldTokenizer(path)


def test_a_byte_that_is_not_there(tmp_path):
    (tmp_path / "v.txt").write_text("1 'a' 1\r\n2 'bc' 2\r\n", newline="")
    tokenizer = load_tokenizer(tmp_path / "v.txt")
    assert tokenizer.encode("abca") == [1, 2, 1]
    with pytest.raises(ValueError, match="byte 0x62 is not"):
        tokenizer.encode("ab")


def test_it_goes_with_the_model(tokenizer, tmp_path):
    z = authors()
    write(tmp_path / "in", z)
    tokenizer.save(tmp_path / "in")
    assert pyseq.from_pretrained(tmp_path / "in").tokenizer.encode("then") == tokenizer.encode("then")
    torch.save(z, tmp_path / "in" / "x.pth")
    convert_checkpoint(tmp_path / "in" / "x.pth", tmp_path / "out")
    model = pyseq.from_pretrained(tmp_path / "out")
    assert model.tokenizer.encode("then the") == tokenizer.encode("then the")
    assert (tmp_path / "out" / world.VOCABULARY).read_bytes() == (tmp_path / "in" / world.VOCABULARY).read_bytes()


def test_the_package_that_ships_it(tokenizer, tmp_path, monkeypatch):
    """Looked up and not imported; asked for by models with its number of rows alone."""
    package = tmp_path / "rwkv"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert world.world_tokenizer(65536) is None
    tokenizer.save(package)
    assert world.world_tokenizer(65536).encode("then") == tokenizer.encode("then")
    assert world.world_tokenizer(61) is None
