"""Text to token ids and back: a `tokenizer.json` through the `tokenizers` library, or plain bytes. World: world.py."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import tokenizers
import torch

from pyseq.models.files import MAX_JSON, write_text

Ids = Iterable[int] | torch.Tensor


class Tokenizer(Protocol):
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Ids) -> str: ...
    def decoder(self) -> Decoder: ...
    def save(self, folder: str | os.PathLike[str]) -> None: ...


class Decoder(Protocol):
    """Decodes token by token. `push` returns the text that has become certain: a character whose last byte is still
    to come is held back. `flush` returns what is left, and starts anew.
    """

    def push(self, token: int) -> str: ...
    def flush(self) -> str: ...


class ByteTokenizer:
    """One token per byte of UTF-8. Ids from 256 on, the padding of the vocabulary, decode to nothing."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Ids) -> str:
        return bytes(t for t in integers(ids) if 0 <= t < 256).decode("utf-8", errors="replace")

    def decoder(self) -> ByteDecoder:
        return ByteDecoder()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Nothing to write: bytes are what a folder without tokenizer.json means."""


class ByteDecoder:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token])) if 0 <= token < 256 else ""

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class JsonTokenizer:
    """A `tokenizer.json`. `encode` adds no special tokens, `decode` leaves them out."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"{path}: {path.stat().st_size} bytes is too long for a tokenizer, at most {MAX_JSON}")
        try:
            self._json = path.read_text(encoding="utf-8")
            self._tokenizer = tokenizers.Tokenizer.from_str(self._json)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: not a valid tokenizer.json: {error}") from error
        self.vocab_size = self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Ids) -> str:
        return self._tokenizer.decode(integers(ids), skip_special_tokens=True)

    def decoder(self) -> JsonDecoder:
        return JsonDecoder(self)

    def save(self, folder: str | os.PathLike[str]) -> None:
        write_text(Path(folder) / "tokenizer.json", self._json)


class JsonDecoder:
    """The text of a token can depend on the one before it, so the last chunk is decoded again with every push."""

    def __init__(self, tokenizer: JsonTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # tokens of _ids whose text has been returned

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self._new_text()
        if text.endswith("\ufffd"):
            return ""
        if text:
            self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return text

    def flush(self) -> str:
        text = self._new_text()
        self._ids, self._shown = [], 0
        return text

    def _new_text(self) -> str:
        return self._tokenizer.decode(self._ids)[len(self._tokenizer.decode(self._ids[: self._shown])) :]


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer that lies in a checkpoint's folder, or None; or that of a file, tokenizer.json or a vocabulary."""
    from pyseq.models.world import VOCABULARY, WorldTokenizer

    path = Path(path)
    if path.suffix in (".txt", ".json") and not path.is_dir():
        return (WorldTokenizer if path.suffix == ".txt" else JsonTokenizer)(path)
    if (path / "tokenizer.json").is_file():
        return JsonTokenizer(path / "tokenizer.json")
    return WorldTokenizer(path / VOCABULARY) if (path / VOCABULARY).is_file() else None


def integers(ids: Ids) -> list[int]:
    if isinstance(ids, torch.Tensor):
        if ids.dim() != 1:
            raise ValueError(f"ids must be [T], got {list(ids.shape)}")
        return ids.tolist()
    return [int(t) for t in ids]
