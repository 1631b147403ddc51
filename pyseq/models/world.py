"""RWKV's World vocabulary: 65 thousand strings of bytes, and the longest that fits is the next token."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
from pathlib import Path

from pyseq.models.files import write_text
from pyseq.models.text import ByteDecoder, Ids, integers

VOCABULARY = "rwkv_vocab_v20230424.txt"
ROWS = 65536  # of the embedding of every World model; the vocabulary names fewer
MAX_BYTES, MAX_LINE = 16 << 20, 1 << 12
LINE = re.compile(r"""(\d{1,7}) (b?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")) (\d{1,4})""")


class WorldTokenizer:
    """A vocabulary file of lines `id literal length`, the literal a Python string (for its UTF-8) or bytes.

    Any bytes are encoded as long as each is a token of its own, as in the World vocabulary; id 0, the end of a text, is
    in no line. Ids without a line decode to nothing, and bytes that are no UTF-8 to U+FFFD.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path}: {path.stat().st_size} bytes is too long for a vocabulary, at most {MAX_BYTES}")
        try:
            self._text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a vocabulary: {error}") from error
        self.tokens: dict[int, bytes] = {}
        # "\n" alone ends a line: literals hold other characters at which splitlines would cut.
        for number, line in enumerate(self._text.split("\n"), 1):
            if line.strip("\r"):
                index, token = _entry(line.strip("\r"), f"{path}, line {number}")
                if index in self.tokens:
                    raise ValueError(f"{path}, line {number}: id {index} is there twice")
                self.tokens[index] = token
        if not self.tokens:
            raise ValueError(f"{path}: not a vocabulary: no line `id literal length`")
        self.vocab_size = max(self.tokens) + 1
        self._ids = {token: index for index, token in self.tokens.items()}
        if len(self._ids) < len(self.tokens):
            raise ValueError(f"{path}: two ids have the same bytes")
        lengths: dict[bytes, set[int]] = {}
        for token in self._ids:
            lengths.setdefault(token[:2], set()).add(len(token))
        self._lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}

    def encode(self, text: str) -> list[int]:
        """Surrogates, which UTF-8 has no bytes for, become `?`."""
        return self.encode_bytes(text.encode("utf-8", errors="replace"))

    def encode_bytes(self, data: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(data):
            for length in [*self._lengths.get(data[at : at + 2], ()), 1]:
                index = self._ids.get(data[at : at + length])
                if index is not None:
                    break
            else:
                raise ValueError(f"text: byte {data[at]:#04x} is not in this vocabulary")
            ids.append(index)
            at += len(self.tokens[index])
        return ids

    def decode_bytes(self, ids: Ids) -> bytes:
        return b"".join(self.tokens.get(index, b"") for index in integers(ids))

    def decode(self, ids: Ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decoder(self) -> WorldDecoder:
        return WorldDecoder(self.tokens)

    def save(self, folder: str | os.PathLike[str]) -> None:
        write_text(Path(folder) / VOCABULARY, self._text)


class WorldDecoder(ByteDecoder):
    def __init__(self, tokens: dict[int, bytes]) -> None:
        super().__init__()
        self._tokens = tokens

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokens.get(token, b""))


def _entry(line: str, where: str) -> tuple[int, bytes]:
    """Only a plain literal reaches the parser."""
    found = LINE.fullmatch(line) if len(line) <= MAX_LINE else None
    if found is None:
        raise ValueError(f"{where}: expected `id literal length`, got {line[:60]!r}")
    try:
        value = ast.literal_eval(found[2])
        token = value.encode("utf-8") if isinstance(value, str) else value
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{where}: not a literal: {found[2][:60]}") from error
    if len(token) != int(found[3]) or not token:
        raise ValueError(f"{where}: {len(token)} bytes, but the line says {found[3]}")
    return int(found[1]), token


def world_tokenizer(rows: int) -> WorldTokenizer | None:
    """For a model of `rows` tokens: the World vocabulary, if it has that many and the package `rwkv` is installed.

    The package is looked up, not imported.
    """
    found = importlib.util.find_spec("rwkv") if rows == ROWS else None
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (path := Path(folder) / VOCABULARY).is_file():
            return WorldTokenizer(path)
    return None
