"""The model a run trains, and how text becomes its tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from pyseq.models import CausalLM, Config, from_pretrained
from pyseq.models.text import JsonTokenizer, Tokenizer, load_tokenizer
from pyseq.models.world import WorldTokenizer

from .corpus import Codec
from .settings import HEADS, Settings


def fresh_model(settings: Settings) -> tuple[CausalLM, Codec]:
    """A model of random weights, or the checkpoint to start from, and its codec."""
    if settings.start_from:
        model = load_model(Path(settings.start_from), settings)
        if settings.tokenizer:
            raise ValueError("tokenizer: the checkpoint to start from has its own; give one of the two")
        _check_layer(model, settings)
        return model, _codec_of(model)
    tokenizer = load_tokenizer(settings.tokenizer) if settings.tokenizer else None
    if settings.tokenizer and tokenizer is None:
        raise ValueError(f"tokenizer = {settings.tokenizer}: neither a tokenizer.json nor a vocabulary of RWKV (.txt)")
    codec = byte_codec() if tokenizer is None else _codec(tokenizer, _separator(tokenizer))
    config = Config(
        d_model=settings.d_model,
        n_layer=settings.layers,
        vocab_size=codec.vocab_size,
        layer=settings.layer or "Mamba",
        layer_args=settings.layer_args,
        tie_embeddings=settings.layer != "RWKV7",  # whose embedding and head begin at sizes far apart
        bos_token_id=codec.separator,
        eos_token_id=codec.separator,
    )
    model = CausalLM(config)
    model.tokenizer = tokenizer or model.tokenizer
    return model.to(settings.device).train(), codec


def _check_layer(model: CausalLM, settings: Settings) -> None:
    """What was said of the layer must be so in the checkpoint, whose geometry the run has."""
    block, layer = model.backbone.layers[0], model.config.layer
    mixer = getattr(block, "mixer", block)  # RWKV-7 is a block of its own
    found = {"layer": layer, "d_state": getattr(mixer, "d_state", None)}
    found["headdim"] = getattr(mixer, HEADS.get(layer, ""), None)
    for name, value in found.items():
        given = getattr(settings, name)
        if given is not None and given != value:
            raise ValueError(f"{name} = {given}: the checkpoint to start from has {value or 'none'}; leave {name} out")


def load_model(path: Path | str, settings: Settings) -> CausalLM:
    return from_pretrained(path, device=settings.device, dtype=torch.float32).train()


def byte_codec() -> Codec:
    """One token per byte; NUL, which no text file contains, separates documents."""
    return Codec(encode=lambda text: text, vocab_size=256, separator=0)


def _separator(tokenizer: Tokenizer) -> int:
    """One more id than the tokenizer has; in RWKV's vocabulary 0 is kept free for it."""
    return 0 if isinstance(tokenizer, WorldTokenizer) else tokenizer.vocab_size


def _codec(tokenizer: Tokenizer, separator: int) -> Codec:
    return Codec(
        encode=lambda text: tokenizer.encode(text.decode("utf-8")),
        vocab_size=max(tokenizer.vocab_size, separator + 1),
        separator=separator,
    )


def _codec_of(model: CausalLM) -> Codec:
    if not isinstance(model.tokenizer, JsonTokenizer | WorldTokenizer):
        if model.config.vocab_size != 256:
            raise ValueError(f"start_from: no tokenizer beside a model of {model.config.vocab_size} tokens")
        return byte_codec()
    end = model.config.eos_token_id
    if not isinstance(end, int):
        raise ValueError(f"start_from: the config must name one end token, which separates documents; it has {end}")
    return _codec(model.tokenizer, end)
