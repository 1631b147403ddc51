"""A part's results, on disk after every item: what a time-out or a crash leaves behind is still a valid file.

    {"part", "card", "date", "commit", "properties", "finished", "items": {name: {"ok", "seconds", ...}}}

`ok` is true, false, or null where the item does not apply here (a tool or a second device is missing); then `why`
says so. An item that its time did not reach is false: a part that is not whole has not passed.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import machine

LEAST = 3.0   # seconds: with less left, an item is not started


class NotHere(Exception):
    """The item does not apply to this machine; says why."""


class OutOfTime(Exception):
    pass


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the block after so many seconds; to be used in the main thread."""

    def stop(*_: Any) -> None:
        raise OutOfTime(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Record:
    def __init__(self, part: str, results: Path, seconds: float, *, resume: bool = False) -> None:
        self.deadline = time.monotonic() + seconds
        properties = machine.properties()
        self.folder = results / machine.slug(properties["name"])
        self.path = self.folder / f"{part}.json"
        self.content: dict[str, Any] = {
            "part": part, "card": properties["name"], "date": datetime.date.today().isoformat(),
            "commit": machine.commit(), "properties": properties, "finished": False, "items": {},
        }
        if resume:
            self.content = json.loads(self.path.read_text())
        self._write()

    @property
    def items(self) -> dict[str, dict[str, Any]]:
        return self.content["items"]

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def item(self, name: str, run: Callable[[], dict[str, Any]], limit: float = 1e9) -> dict[str, Any]:
        """Runs it within what is left of the part's time, keeps what it returns, and prints one line.

        `run` may set "ok" itself; without that, returning is success.
        """
        start, left = time.monotonic(), self.left()
        try:
            if left < LEAST:
                raise OutOfTime("not reached within the time of this part")
            with at_most(min(limit, left)):
                found = {"ok": True, **run()}
        except NotHere as why:
            found = {"ok": None, "why": str(why)}
        except OutOfTime as why:
            found = {"ok": False, "why": str(why)}
        except Exception as error:
            text = f"{type(error).__name__}: {error}".strip()
            found = {"ok": False, "why": text[:2000], "traceback": traceback.format_exc()[-4000:]}
        found["seconds"] = round(time.monotonic() - start, 3)
        self.items[name] = found
        self._write()
        print(line(name, found), flush=True)
        return found

    def finish(self) -> int:
        """Marks the file as whole and prints the summary; the exit status of the part."""
        self.content["finished"] = True
        self._write()
        failed = [name for name, found in self.items.items() if found["ok"] is False]
        passed = sum(found["ok"] is True for found in self.items.values())
        absent = len(self.items) - passed - len(failed)
        print(f"gpu-{self.content['part']} on {self.content['card']}: {passed} passed, {len(failed)} failed, "
              f"{absent} not applicable; {self.path}")
        for name in failed:
            print(f"  failed: {name}: {self.items[name].get('why', '')[:300]}")
        return 1 if failed or not passed else 0

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(partial, self.path)


def line(name: str, found: dict[str, Any]) -> str:
    word = {True: "ok", False: "FAILED", None: "-"}[found["ok"]]
    note = found.get("summary") or found.get("why", "")
    return f"{word:6s} {found['seconds']:7.1f}s  {name}{': ' + note.splitlines()[0][:200] if note else ''}"
