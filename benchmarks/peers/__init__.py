"""One adapter per library that a user could pick instead of pyseq.

An adapter takes inputs in pyseq's layout (`inputs.py`), copies them once into the peer's own layout, and returns a
callable without arguments: only that callable is timed. What it returns is a view in pyseq's layout, so that
`check.py` can compare it with a float64 loop.
"""

import importlib
from types import ModuleType


class PeerMissing(ImportError):
    """The peer's package is not installed."""


def require(module: str, distribution: str) -> ModuleType:
    """Import `module`, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PeerMissing(f"{distribution} is missing ({error}); `make bench-peers` installs the peers") from error
