"""The log of a run: one JSON object per line, appended; a resumed run first cuts it back to its checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Log:
    """Appends records. `size` is the length of the file in bytes: a checkpoint keeps it, a resumed run passes it."""

    def __init__(self, path: Path, size: int = 0) -> None:
        self.path = path
        self._file = open(path, "ab")  # noqa: SIM115 (closed by close)
        self._file.truncate(min(size, path.stat().st_size))
        self._file.seek(0, os.SEEK_END)

    def write(self, **record: Any) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Brings every record to the disk; returns the size."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a log; a last line that a kill left incomplete is passed over."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]
