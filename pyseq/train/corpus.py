"""Text files -> two memory-mapped streams of tokens, train and held-out, split by file.

A document is a file, stored as [separator, token, token, ...]: the separator is what a model reads before it predicts
the first token, and what it should predict after the last. `<split>.bin` holds the tokens (uint8, uint16 or int32,
little-endian), `corpus.safetensors` where each document begins, and in its metadata the bytes of text and what gzip
and xz make of the held-out ones.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import sysconfig
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SPLITS = ("train", "held_out")
KINDS = {1 << 8: ("uint8", "B"), 1 << 16: ("uint16", "H"), 1 << 31: ("int32", "i")}  # vocabulary: dtype, array's code
Progress = Callable[[int, int], None]  # done, all


@dataclass(frozen=True)
class Stream:
    """Documents one after another."""

    ids: Tensor  # [n], memory-mapped
    offsets: Tensor  # [documents + 1], int64: where each begins, and n
    text_bytes: int  # of UTF-8 text, separators not counted

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / max(1, len(self.ids) - (len(self.offsets) - 1))


@dataclass(frozen=True)
class Corpus:
    train: Stream
    held_out: Stream
    gzip: float  # bits per byte of the held-out text, compressed as one piece at the highest level
    xz: float


@dataclass(frozen=True)
class Codec:
    """How the UTF-8 bytes of a text become tokens. `separator` is a token that no text becomes."""

    encode: Callable[[bytes], Sequence[int]]
    vocab_size: int
    separator: int


def standard_library() -> Path:
    """The folder of the sources that every Python installation carries, pydoc_data among them."""
    return Path(sysconfig.get_path("stdlib"))


def text_files(paths: Sequence[str]) -> list[Path]:
    """The files to read, in an order that does not depend on the file system.

    Folders are walked without following links; hidden names are left out. No paths: the Python sources of the standard
    library, without its tests, which many installations leave out.
    """
    if not paths:
        skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
        return [path for path in _walk(standard_library(), skipped) if path.suffix == ".py"]
    files: dict[Path, None] = {}
    for given in paths:
        path = Path(given)
        if path.is_dir():
            files.update(dict.fromkeys(_walk(path, set())))
        elif path.is_file():
            files[path] = None
        else:
            raise ValueError(f"data: {given} is neither a file nor a folder")
    return list(files)


def _walk(root: Path, skipped: set[str]) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__pycache__")) and f not in skipped)
        yield from (
            path
            for name in sorted(names)
            if not name.startswith(".") and (path := Path(folder, name)).is_file() and not path.is_symlink()
        )


def read_text(path: Path) -> bytes | None:
    """The bytes of a text file; None if it is empty or not text (not UTF-8, or with a NUL)."""
    try:
        text = path.read_bytes()
        text.decode("utf-8")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise ValueError(f"data: cannot read {path}: {error.strerror}") from error
    return text if text and b"\0" not in text else None


@dataclass(frozen=True)
class _Piece:
    """A document: bytes begin:end of a file."""

    path: Path
    begin: int
    end: int


def split_by_file(files: Sequence[Path], held_out: int | None, progress: Progress) -> tuple[list[_Piece], list[_Piece]]:
    """Train and held-out documents. Whether a file is held out depends on the hashes of the texts alone, not on names
    or places; a text that occurs twice is read once, so that no held-out file is also in train."""
    found: dict[bytes, _Piece] = {}
    for done, path in enumerate(files, 1):
        text = read_text(path)
        if text is not None:
            found.setdefault(hashlib.sha256(text).digest(), _Piece(path, 0, len(text)))
        progress(done, len(files))
    total = sum(piece.end for piece in found.values())
    if total < 2:
        raise ValueError(f"data: no text in {len(files)} files (text is UTF-8 without NUL)")
    wanted = min(total // 20, 1 << 18) if held_out is None else held_out
    wanted = max(1, wanted)
    if wanted >= total:
        raise ValueError(f"held_out = {held_out}: the text has only {total} bytes")
    if len(found) == 1:
        return _cut(next(iter(found.values())), wanted)
    chosen: set[bytes] = set()
    size = 0
    for key in sorted(found):
        if size + found[key].end <= wanted:
            chosen.add(key)
            size += found[key].end
    if not chosen:
        chosen.add(min(found, key=lambda key: (found[key].end, key)))
    train = [piece for key, piece in found.items() if key not in chosen]
    return train, [piece for key, piece in found.items() if key in chosen]


def _cut(piece: _Piece, wanted: int) -> tuple[list[_Piece], list[_Piece]]:
    """A single file is split in two: its end is held out, from the start of a line where there is one."""
    text = piece.path.read_bytes()
    middle = text.rfind(b"\n", 0, piece.end - wanted) + 1 or piece.end - wanted
    while text[middle] & 0xC0 == 0x80:  # inside a UTF-8 sequence
        middle -= 1
    middle = max(1, middle)
    return [_Piece(piece.path, 0, middle)], [_Piece(piece.path, middle, piece.end)]


def prepare(folder: Path, files: Sequence[Path], codec: Codec, held_out: int | None, progress: Progress) -> Corpus:
    """Writes the streams into `folder` and opens them. The index comes last: where it is, all the rest is."""
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "corpus.safetensors"
    index.unlink(missing_ok=True)
    train, out = split_by_file(files, held_out, lambda done, every: progress(done, 2 * every))
    pieces = {"train": train, "held_out": out}
    dtype, code = next(kind for size, kind in KINDS.items() if codec.vocab_size <= size)
    tensors: dict[str, Tensor] = {}
    text_bytes: dict[str, int] = {}
    gzip, xz = zlib.compressobj(9, wbits=31), lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    gzip_bytes = xz_bytes = 0
    count, done = sum(map(len, pieces.values())), 0
    for split in SPLITS:
        offsets, text_bytes[split] = [0], 0
        with open(folder / f"{split}.bin", "wb") as file:
            for piece in pieces[split]:
                text = piece.path.read_bytes()[piece.begin : piece.end]
                ids = array(code, [codec.separator])
                ids.extend(codec.encode(text))
                ids.tofile(file)
                offsets.append(offsets[-1] + len(ids))
                text_bytes[split] += len(text)
                if split == "held_out":
                    gzip_bytes += len(gzip.compress(text))
                    xz_bytes += len(xz.compress(text))
                done += 1
                progress(count + done, 2 * count)
            file.flush()
            os.fsync(file.fileno())
        tensors[split] = torch.tensor(offsets)
    facts = {
        "dtype": dtype,
        "text_bytes": text_bytes,
        "gzip": 8 * (gzip_bytes + len(gzip.flush())) / text_bytes["held_out"],
        "xz": 8 * (xz_bytes + len(xz.flush())) / text_bytes["held_out"],
    }
    save_file(tensors, index.with_suffix(".tmp"), metadata={"corpus": json.dumps(facts)})
    os.replace(index.with_suffix(".tmp"), index)
    return open_corpus(folder)


def open_corpus(folder: Path) -> Corpus:
    """Opens what `prepare` wrote."""
    index = folder / "corpus.safetensors"
    try:
        with safe_open(index, "pt") as file:
            facts = json.loads(file.metadata()["corpus"])
            offsets = {split: file.get_tensor(split) for split in SPLITS}
        dtype = {name: getattr(torch, name) for name, _ in KINDS.values()}[facts["dtype"]]
        streams = {}
        for split in SPLITS:
            path, size = folder / f"{split}.bin", int(offsets[split][-1])
            if path.stat().st_size != size * dtype.itemsize:
                raise ValueError(f"{path} has {path.stat().st_size} bytes, expected {size * dtype.itemsize}")
            ids = torch.from_file(str(path), shared=False, size=size, dtype=dtype)
            streams[split] = Stream(ids, offsets[split], int(facts["text_bytes"][split]))
        return Corpus(streams["train"], streams["held_out"], float(facts["gzip"]), float(facts["xz"]))
    except (OSError, KeyError, TypeError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} does not hold a prepared corpus: {error}") from error
