"""The `pyseq` command. Modules that import torch are imported inside the commands, so that help appears at once."""

from __future__ import annotations

import typer

from .bench import bench
from .convert import convert
from .demo import demo
from .doctor import doctor
from .generate import generate
from .train import train
from .verify import verify

app = typer.Typer(
    name="pyseq",
    help="Linear-recurrence sequence layers for PyTorch: train, write text, convert, measure, check.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for _command in (doctor, demo, train, generate, convert, bench, verify):
    app.command()(_command)


def main() -> None:
    app()
