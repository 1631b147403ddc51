"""What every command shares: results on standard output, everything else on standard error, clear failures."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

P = ParamSpec("P")
R = TypeVar("R")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default what torch chooses.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:1, ...", show_default="cuda if there is a GPU, else cpu")
]


def results() -> Console:
    return Console(highlight=False)


def messages() -> Console:
    return Console(stderr=True, highlight=False)


def bar() -> Progress:
    """A progress bar for work whose items are counted."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=messages(), transient=True)


def print_json(value: Any) -> None:
    """One line, so that a program can read several commands' outputs as JSON Lines."""
    sys.stdout.write(json.dumps(value) + "\n")


def clear_failures(command: Callable[P, R]) -> Callable[P, R]:
    """What a user can put right (bad values, missing or broken files, a full disk) is a sentence and exit code 1."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:  # the reader, say `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except (ValueError, OSError, FloatingPointError, ImportError) as error:
            messages().print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(1) from error

    return run


def use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def checkpoint_in(path: str) -> str:
    """The folder of a run stands for its last checkpoint; anything else for itself."""
    latest = Path(path) / "latest"
    return str(latest) if latest.is_dir() else path


def seconds(text: str) -> float:
    """`90`, `90s`, `2m`, `1.5h`."""
    factor = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    try:
        return float(text[:-1]) * factor if factor else float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r}: expected a time such as 90s, 2m or 1.5h") from None
