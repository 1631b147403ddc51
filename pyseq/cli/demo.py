"""`pyseq demo`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .generate import write
from .output import Threads, clear_failures, messages, results, seconds, use_threads
from .train import scores

PROMPT = "The "


@clear_failures
def demo(
    data: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH", help="Text files or folders.", show_default="Python's standard library"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run.", file_okay=False)] = Path("runs/demo"),
    time_limit: Annotated[str, typer.Option(help="Time to train for, such as 90s or 2m.")] = "2m",
    threads: Threads = None,
) -> None:
    """Train a small Mamba for two minutes, measure it, and let it write.

    It learns byte by byte. Run again, it goes on where it was interrupted, or only writes if training is complete.
    """
    use_threads(threads)
    from pyseq.models import from_pretrained
    from pyseq.train import Settings, preset, resume, train
    from pyseq.train.chart import as_text
    from pyseq.train.checkpoint import checkpoints

    from .progress import TrainingBars

    console = results()
    bars = TrainingBars()
    before = checkpoints(out)
    with bars.progress:
        if before:
            result = resume(out, bars)
        else:
            chosen = {"data": tuple(data or ()), "time_limit": seconds(time_limit)}
            result = train(Settings(**{**preset("demo"), **chosen}), out, bars)
    if result.stopped_by is not None:
        messages().print(f"stopped at step {result.step} of {result.steps}; the same command goes on from there")
        raise typer.Exit(128 + result.stopped_by)
    if before and before[-1] == result.checkpoint:
        console.print(f"{out} is trained already; remove the folder to train again.\n", soft_wrap=True)
    console.print("bits per byte: solid train, dotted xz on the held-out text")
    console.print(as_text(result.curve))
    console.print(scores(result))
    console.print(f"\n{result.checkpoint} writes, at temperature 0.7:\n", style="bold", soft_wrap=True)
    model = from_pretrained(result.checkpoint).pack()
    write(model, PROMPT, 400, show=True, temperature=0.7, seed=1)
    console.print(
        f"\n[bold]Next[/bold]\n"
        f"  open {result.picture}\n"
        f'  pyseq generate {out} --prompt "class "\n'
        f"  pyseq train --preset small --out runs/small     half an hour, better text\n"
        f"  pyseq train FILES... --out runs/mine            your own text\n"
        f"  pyseq doctor                                    which kernels run here",
        soft_wrap=True,
    )
