"""`pyseq train`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .output import clear_failures, messages, print_json, results, seconds, use_threads

if TYPE_CHECKING:
    from pyseq.train import Result

TEXT, TASK, MODEL, BUDGET = "Text", "Task instead of text", "Model", "Length of the run"
OPTIMIZER, RUN = "Optimizer", "Run"
NOT_SETTINGS = {"resume", "out", "json", "threads", "preset"}


@clear_failures
def train(
    context: typer.Context,
    data: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH", help="Text files, and folders of them.", rich_help_panel=TEXT),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="A tokenizer.json, or RWKV's vocabulary (.txt). Without one, a token is a byte.", rich_help_panel=TEXT
        ),
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option(
            help="Bytes of text never trained on.", show_default="a twentieth, at most 256 KiB", rich_help_panel=TEXT
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="parity, even-pairs, mod-arithmetic, s5, a5, z60, s5-swaps, ...", rich_help_panel=TASK),
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Heads.", show_default="2", rich_help_panel=TASK)] = None,
    negative: Annotated[
        bool | None,
        typer.Option(
            "--negative/--no-negative",
            help="Eigenvalues down to -1, where the layer can have them.",
            show_default="negative",
            rich_help_panel=TASK,
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="Lengths to measure at.", show_default="40,64,128,256", rich_help_panel=TASK),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(help="demo, small, medium: two minutes, half an hour, a night on 2 cores.", rich_help_panel=MODEL),
    ] = "demo",
    layer: Annotated[
        str | None,
        typer.Option(
            help="mamba, mamba2 or rwkv7; for a task also gated_delta_net, kimi_delta_attention.",
            show_default="mamba, for a task gated_delta_net",
            rich_help_panel=MODEL,
        ),
    ] = None,
    d_model: Annotated[int | None, typer.Option(help="Width.", rich_help_panel=MODEL)] = None,
    layers: Annotated[int | None, typer.Option(help="Depth.", rich_help_panel=MODEL)] = None,
    d_state: Annotated[
        int | None,
        typer.Option(help="State size per channel.", show_default="16, mamba2: 128", rich_help_panel=MODEL),
    ] = None,
    headdim: Annotated[
        int | None,
        typer.Option(
            help="Channels per head; divides twice the width of mamba2, the width of rwkv7.",
            show_default="64",
            rich_help_panel=MODEL,
        ),
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint or Hub id whose weights to start from, with its geometry.", rich_help_panel=MODEL
        ),
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(
            help="Such as 90s, 2m, 1.5h: fixes the number of steps after timing a few.", rich_help_panel=BUDGET
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Number of steps, instead of a time.", rich_help_panel=BUDGET)
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Rows per batch.", rich_help_panel=BUDGET)] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens per row; the longest word of a task.", rich_help_panel=BUDGET)
    ] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches per step.", rich_help_panel=BUDGET)] = None,
    carry_state: Annotated[
        bool | None,
        typer.Option(
            "--carry-state", help="Start each row in the state its document was left in.", rich_help_panel=BUDGET
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="At the end of the warm-up.", rich_help_panel=OPTIMIZER)
    ] = None,
    final_rate: Annotated[
        float | None, typer.Option(help="At the last step, as a share of --learning-rate.", rich_help_panel=OPTIMIZER)
    ] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps of linear warm-up.", rich_help_panel=OPTIMIZER)] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Of matrices; never of A_log, D, biases, norms.", rich_help_panel=OPTIMIZER)
    ] = None,
    clip: Annotated[float | None, typer.Option(help="Largest norm of the gradient.", rich_help_panel=OPTIMIZER)] = None,
    bf16: Annotated[
        bool | None,
        typer.Option(
            "--bf16/--no-bf16",
            help="Matrix products in bfloat16.",
            show_default="on a GPU, and where the CPU has instructions for it",
            rich_help_panel=OPTIMIZER,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run.", show_default="runs/train", rich_help_panel=RUN, file_okay=False),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Folder of a run to continue, with the settings it began with.", rich_help_panel=RUN),
    ] = None,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between.", show_default="a fifth of the run", rich_help_panel=RUN)
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between.", show_default="a fifth of the run", rich_help_panel=RUN)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of weights and of the order of the text.", rich_help_panel=RUN)
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda or cuda:1, ...", show_default="cuda if there is a GPU, else cpu", rich_help_panel=RUN
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", show_default="torch's choice", rich_help_panel=RUN)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=RUN)] = False,
) -> None:
    """Train a Mamba, Mamba-2 or RWKV-7 language model on text, or with --task a model that tracks a state.

    PATHs are text files and folders of them; without any it reads the sources of Python's standard library. Whole files
    are held out, so the held-out figure is of text the model has never seen.

    A run is a folder of checkpoints (safetensors), log.jsonl and curve.png. Ctrl-C saves and stops; --resume goes on to
    the same bits as a run that never stopped.

    - `pyseq train notes.txt --steps 500`
    - `pyseq train ~/books --preset small --out runs/books`
    - `pyseq train ~/books --preset small --layer mamba2 --out runs/books2`
    - `pyseq train ~/books --preset small --layer rwkv7 --out runs/books7`
    - `pyseq train --resume runs/books`
    - `pyseq train --task parity --steps 1000 --no-negative`
    """
    given = {
        name: value
        for name, value in context.params.items()
        if name not in NOT_SETTINGS and getattr(context.get_parameter_source(name), "name", "DEFAULT") != "DEFAULT"
    }
    if resume and (given or out):
        extra = ", ".join(sorted(given) or ["out"])
        raise typer.BadParameter(f"goes on with the settings of the run: leave out {extra}", param_hint="--resume")
    use_threads(threads)
    if task is not None or {"heads", "negative", "lengths"} & set(given):
        from .train_task import train_task

        if preset != "demo":
            raise typer.BadParameter("does not go with --task", param_hint="--preset")
        return train_task(task, given, out, json)
    from pyseq._cuda import usable_device
    from pyseq.models.config import LAYERS
    from pyseq.train import PRESETS, Settings
    from pyseq.train import preset as values_of
    from pyseq.train import resume as resume_run
    from pyseq.train import train as start_run

    from .progress import TrainingBars

    if preset not in PRESETS:
        raise typer.BadParameter(f"{preset!r}: expected one of {', '.join(PRESETS)}", param_hint="--preset")
    known = {name.lower(): name for name in LAYERS}
    if layer is not None and layer not in known:
        raise typer.BadParameter(f"{layer!r}: expected {' or '.join(known)}", param_hint="--layer")
    bars = TrainingBars()
    with bars.progress:
        if resume:
            result = resume_run(resume, bars)
        else:
            if layer is not None:
                given["layer"] = known[layer]
            values = merged(values_of(preset, usable_device(device)), given)
            result = start_run(Settings(**values), out or Path("runs/train"), bars)
    report(result, json)
    if result.stopped_by is not None:
        messages().print(
            f"stopped at step {result.step} of {result.steps}; pyseq train --resume {result.log.parent} goes on"
        )
        raise typer.Exit(128 + result.stopped_by)


def merged(preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The preset with what was given; a number of steps replaces the preset's time and the other way round."""
    given = dict(given)
    if "data" in given:
        given["data"] = tuple(given["data"])
    if "time_limit" in given:
        given["time_limit"] = seconds(given["time_limit"])
    base = {name: value for name, value in preset.items() if name != "time_limit" or "steps" not in given}
    return {**base, **given}


def report(result: Result, json: bool) -> None:
    if json:
        print_json(
            {
                "checkpoint": str(result.checkpoint),
                "curve": str(result.picture),
                "log": str(result.log),
                "step": result.step,
                "steps": result.steps,
                "complete": result.complete,
                "parameters": result.parameters,
                "held_out_bits_per_byte": result.held_out,
                "gzip_bits_per_byte": result.gzip,
                "xz_bits_per_byte": result.xz,
            }
        )
        return
    console = results()
    console.print(scores(result))
    console.print(
        f"curve       {result.picture}\nlog         {result.log}\ncheckpoint  {result.checkpoint}", soft_wrap=True
    )


def scores(result: Result) -> Table:
    table = Table("held-out text", "bits per byte", title=None)
    table.columns[1].justify = "right"
    table.add_row("gzip -9", f"{result.gzip:.3f}")
    table.add_row("xz -9e", f"{result.xz:.3f}")
    table.add_row(
        f"this model, {result.parameters / 1e6:.2f} M parameters, step {result.step}", f"[bold]{result.held_out:.3f}"
    )
    return table
