from __future__ import annotations

import gzip
import itertools
import lzma
import shutil
from pathlib import Path

import pytest
import torch

from pyseq.train.corpus import Codec, Corpus, Stream, open_corpus, prepare, text_files
from pyseq.train.model import byte_codec


def read(folder: Path, text: Path, held_out: int | None = 400, codec: Codec | None = None) -> Corpus:
    return prepare(folder, text_files([str(text)]), codec or byte_codec(), held_out, lambda done, total: None)


def documents(stream: Stream) -> list[bytes]:
    offsets = stream.offsets.tolist()
    pieces = [stream.ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    assert all(piece[0] == 0 for piece in pieces)
    return [bytes(piece[1:]) for piece in pieces]


def test_every_file_is_in_one_split(tmp_path: Path, text: Path) -> None:
    corpus = read(tmp_path / "data", text)
    train, held_out = documents(corpus.train), documents(corpus.held_out)
    assert sorted(train + held_out) == sorted(path.read_bytes() for path in text.rglob("*.txt"))
    assert 300 < corpus.held_out.text_bytes <= 400
    assert corpus.held_out.text_bytes == sum(map(len, held_out))


def test_the_split_does_not_depend_on_names_and_places(tmp_path: Path, text: Path) -> None:
    corpus = read(tmp_path / "data", text)
    moved = tmp_path / "moved"
    moved.mkdir()
    for i, path in enumerate(sorted(text.rglob("*.txt"))):
        shutil.copy(path, moved / f"{99 - i}.md")
    again = read(tmp_path / "again", moved)
    assert sorted(documents(corpus.held_out)) == sorted(documents(again.held_out))


def test_a_copy_is_read_once_so_that_nothing_held_out_is_trained_on(tmp_path: Path, text: Path) -> None:
    before = read(tmp_path / "data", text)
    for path in list(text.rglob("*.txt")):
        shutil.copy(path, text / f"copy{path.name}")
    after = read(tmp_path / "again", text)
    assert sorted(documents(before.train)) == sorted(documents(after.train))
    assert sorted(documents(before.held_out)) == sorted(documents(after.held_out))


def test_what_is_not_text_is_left_out(tmp_path: Path, text: Path) -> None:
    expected = read(tmp_path / "data", text).train.text_bytes
    (text / "nul").write_bytes(b"a\0b")
    (text / "latin1").write_bytes("é".encode("latin-1"))
    (text / "empty").touch()
    (text / ".hidden").write_text("secret")
    (text / ".git").mkdir()
    (text / ".git" / "config").write_text("secret")
    (text / "link").symlink_to(text / "a")
    assert read(tmp_path / "again", text).train.text_bytes == expected


def test_the_end_of_a_single_file_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("".join(f"line {i} ∂\n" for i in range(100)), encoding="utf-8")
    corpus = read(tmp_path / "data", path, held_out=100)
    (train,), (held_out,) = documents(corpus.train), documents(corpus.held_out)
    assert train + held_out == path.read_bytes()
    assert train.endswith(b"\n") and 100 <= len(held_out) < 115


def test_a_single_line_is_cut_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("∂" * 50, encoding="utf-8")
    corpus = read(tmp_path / "data", path, held_out=10)
    for stream in (corpus.train, corpus.held_out):
        assert set(documents(stream)[0].decode()) == {"∂"}


def test_gzip_and_xz_on_the_held_out_text(tmp_path: Path, text: Path) -> None:
    corpus = read(tmp_path / "data", text)
    whole = b"".join(documents(corpus.held_out))
    assert corpus.gzip == 8 * len(gzip.compress(whole, 9)) / len(whole)
    assert corpus.xz == 8 * len(lzma.compress(whole, preset=9 | lzma.PRESET_EXTREME)) / len(whole)


@pytest.mark.parametrize(("vocabulary", "dtype"), [(256, torch.uint8), (257, torch.uint16), (65537, torch.int32)])
def test_tokens_are_stored_in_the_smallest_type(
    tmp_path: Path, text: Path, vocabulary: int, dtype: torch.dtype
) -> None:
    codec = Codec(encode=lambda text: [vocabulary - 1] * len(text), vocab_size=vocabulary, separator=0)
    ids = read(tmp_path / "data", text, codec=codec).train.ids
    assert ids.dtype == dtype and int(ids[1]) == vocabulary - 1


def test_the_default_is_the_standard_library() -> None:
    files = text_files([])
    names = {path.as_posix() for path in files}
    assert len(files) > 400
    assert any(name.endswith("pydoc_data/topics.py") for name in names)
    assert not any("/test/" in name or "/site-packages/" in name for name in names)


@pytest.mark.parametrize(
    ("content", "held_out", "message"),
    [(None, 400, "neither a file nor a folder"), (b"\0\0", 400, "no text"), (b"abc\n", 400, "held_out = 400")],
)
def test_data_that_cannot_be_used(tmp_path: Path, content: bytes | None, held_out: int, message: str) -> None:
    path = tmp_path / "data.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "data", path, held_out)


@pytest.mark.parametrize("damage", ["short", "no index", "broken index"])
def test_a_damaged_corpus_is_refused(tmp_path: Path, text: Path, damage: str) -> None:
    folder = tmp_path / "data"
    read(folder, text)
    index, tokens = folder / "corpus.safetensors", folder / "train.bin"
    if damage == "short":
        tokens.write_bytes(tokens.read_bytes()[:-1])
    elif damage == "no index":
        index.unlink()
    else:
        index.write_bytes(index.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"prepared corpus|bytes, expected"):
        open_corpus(folder)
