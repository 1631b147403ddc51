"""`pyseq convert`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import Json, clear_failures, print_json, results


@clear_failures
def convert(
    source: Annotated[
        Path, typer.Argument(help="A checkpoint: a folder or a file, pickled (.bin, .pt, .pth) or safetensors.")
    ],
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
    json: Json = False,
) -> None:
    """Rewrite a checkpoint as safetensors.

    Pickles are read with torch's `weights_only=True`, which runs no code from the file.
    """
    from pyseq.models import convert_checkpoint

    convert_checkpoint(source, target)
    size = sum(path.stat().st_size for path in target.iterdir() if path.is_file())
    if json:
        print_json({"source": str(source), "target": str(target), "bytes": size})
    else:
        results().print(f"{target}: {size / 1e6:.1f} MB", soft_wrap=True)
