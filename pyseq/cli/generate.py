"""`pyseq generate`"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import Device, Json, Threads, checkpoint_in, clear_failures, print_json, use_threads

if TYPE_CHECKING:
    from pyseq.models import CausalLM

SAMPLING = "Sampling"


@clear_failures
def generate(
    model: Annotated[str, typer.Argument(help="A run, a checkpoint folder, a .safetensors file or a Hub id.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to go on from; - reads standard input.")] = "",
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=0, help="Tokens to write at most.")
    ] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", rich_help_panel=SAMPLING)] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest.", rich_help_panel=SAMPLING)] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Only the likeliest that together reach p.", rich_help_panel=SAMPLING)
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 avoids repeats.", rich_help_panel=SAMPLING)] = 1.0,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="A tokenizer.json, or RWKV's vocabulary (.txt).",
            show_default="what lies beside the weights; bytes for 256 tokens",
        ),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the writing.", rich_help_panel=SAMPLING)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed writes the same.", rich_help_panel=SAMPLING)] = None,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16.", show_default="the checkpoint's")] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Write text with a trained model, shown as it comes.

    - `pyseq generate runs/demo --prompt "def main("`
    - `pyseq generate runs/demo --prompt - < notes.txt`
    """
    use_threads(threads)
    import torch

    from pyseq._cuda import usable_device
    from pyseq.models import from_pretrained
    from pyseq.models.text import load_tokenizer

    kinds = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in kinds:
        raise typer.BadParameter(f"{dtype!r}: expected float32 or bfloat16", param_hint="--dtype")
    text = sys.stdin.read() if prompt == "-" else prompt
    loaded = from_pretrained(checkpoint_in(model), device=usable_device(device), dtype=kinds[dtype]).pack()
    loaded.tokenizer = (load_tokenizer(tokenizer) if tokenizer else None) or loaded.tokenizer
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop or None,
        "seed": seed,
    }
    began = time.perf_counter()
    written, tokens = write(loaded, text, max_new_tokens, show=not json, **options)
    spent = time.perf_counter() - began
    if json:
        print_json(
            {"prompt": text, "text": written, "tokens": tokens, "seconds": spent, "tokens_per_second": tokens / spent}
        )


def write(model: CausalLM, prompt: str, max_new_tokens: int, *, show: bool, **options: Any) -> tuple[str, int]:
    """Goes on from the prompt, printing both as the text comes if `show`: the new text and how many tokens it took.

    An empty prompt is the start of a document. The end of a document ends the writing.
    """
    import torch

    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(
            f"a model of {model.config.vocab_size} tokens without a tokenizer: name one, --tokenizer FILE, or put "
            "tokenizer.json or rwkv_vocab_v20230424.txt beside the weights (the PyPI package rwkv brings the latter)"
        )
    config = model.config
    start = [token for token in (config.bos_token_id, config.eos_token_id) if isinstance(token, int)]
    ids = tokenizer.encode(prompt) or start[:1]
    if not ids:
        raise ValueError("prompt: empty, and the config of this model names no token that begins a text")
    decoder = tokenizer.decoder()
    ends = {config.eos_token_id} if isinstance(config.eos_token_id, int) else set(config.eos_token_id or ())
    pieces: list[str] = []
    count = 0

    def emit(piece: str) -> None:
        pieces.append(piece)
        if show:
            sys.stdout.write(piece)
            sys.stdout.flush()

    def take(token: torch.Tensor) -> None:
        nonlocal count
        count += 1
        if int(token) not in ends:
            emit(decoder.push(int(token)))

    if show:
        sys.stdout.write(prompt)
    device = next(model.parameters()).device
    model.generate(
        torch.tensor([ids], device=device),
        max_new_tokens,
        stream=take,
        eos_token_id=sorted(ends) or None,
        **options,
    )
    emit(decoder.flush())
    if show:
        sys.stdout.write("\n")
    return "".join(pieces), count
