"""What the shapes of a checkpoint's tensors say, and whether the config says the same."""

from __future__ import annotations

import re
from typing import Any

from pyseq.models.config import Config
from pyseq.models.files import Tensors

LAYER = re.compile(r"backbone\.layers\.(\d{1,5})\.")
FIRST = "backbone.layers.0.mixer."
EMBEDDING, HEAD = "backbone.embeddings.weight", "lm_head.weight"


def shape(tensors: Tensors, names: dict[str, str], name: str, dims: int) -> list[int]:
    if name not in names:
        raise ValueError(f"checkpoint: tensor {name!r} is missing")
    found = tensors.shape(names[name])
    if len(found) != dims or 0 in found:
        raise ValueError(f"checkpoint: {names[name]} has shape {found}, expected {dims} non-empty dimensions")
    return found


class Sizes:
    """The geometry of a checkpoint around any layer, from the names and shapes of its tensors."""

    def __init__(self, tensors: Tensors, names: dict[str, str]) -> None:
        layers = {int(found.group(1)) for name in names if (found := LAYER.match(name))}
        self.n_layer = len(layers)
        if not layers or max(layers) + 1 != self.n_layer:
            raise ValueError(f"checkpoint: layers must be numbered from 0 without gaps, got {sorted(layers)[:8]}")
        self.rows, self.d_model = shape(tensors, names, EMBEDDING, 2)
        self.head = HEAD in names
        self.same_head = self.head and _same(tensors, names)

    def tied(self, claim: Any) -> bool:
        """Whether the head is the embedding. The original code writes a tied head twice, transformers leaves it out."""
        if claim is None:
            return not self.head or self.same_head
        if claim and self.head and not self.same_head:
            raise ValueError("config says the head is tied to the embedding, but the checkpoint holds a different head")
        if not claim and not self.head:
            raise ValueError(f"config says the head is not tied, but tensor {HEAD!r} is missing")
        return bool(claim)


def _same(tensors: Tensors, names: dict[str, str]) -> bool:
    head, embedding = names[HEAD], names[EMBEDDING]
    if tensors.shape(head) != tensors.shape(embedding):
        return False
    return bool((tensors.read(head) == tensors.read(embedding)).all())


def agree(config: Config, sizes: Sizes) -> None:
    pairs = [("d_model", config.d_model, sizes.d_model), ("n_layer", config.n_layer, sizes.n_layer)]
    pairs.append(("vocab_size, padded,", config.padded_vocab_size, sizes.rows))
    for name, claimed, found in pairs:
        if claimed != found:
            raise ValueError(f"config: {name} is {claimed}, but the tensors say {found}")
    sizes.tied(config.tie_embeddings)


def match(raw: dict[str, Any], key: str, found: int | bool) -> None:
    claimed = raw.get(key)
    if claimed is not None and (type(claimed) is not type(found) or claimed != found):
        raise ValueError(f"config: {key} is {claimed!r}, but the tensors say {found}")


def match_expand(expand: Any, inner: int, d_model: int) -> None:
    if not isinstance(expand, int | float) or not 0 <= expand * d_model - inner < 1:  # rounded down
        raise ValueError(f"config: expand is {expand!r}, but the tensors say {inner} / {d_model}")


def must(raw: dict[str, Any], key: str, allowed: tuple[Any, ...], default: Any) -> None:
    value = raw.get(key, default)
    if value not in allowed:
        raise ValueError(f"config: {key} is {value!r}; this version reads checkpoints where it is {allowed[0]!r}")


def of_transformers(raw: dict[str, Any], sizes: Sizes, layer: str, args: dict[str, Any], tie: Any) -> Config:
    """The model around the layers. `tie` is what a config means that does not say whether the head is tied."""
    must(raw, "hidden_act", ("silu", "swish"), "silu")
    match(raw, "hidden_size", sizes.d_model)
    match(raw, "num_hidden_layers", sizes.n_layer)
    match(raw, "vocab_size", sizes.rows)
    return Config(
        d_model=sizes.d_model,
        n_layer=sizes.n_layer,
        vocab_size=sizes.rows,
        layer=layer,
        layer_args=args,
        tie_embeddings=sizes.tied(raw.get("tie_word_embeddings", tie)),
        norm_eps=raw.get("layer_norm_epsilon", 1e-5),
        pad_vocab_size_multiple=1,
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=raw.get("eos_token_id"),
        pad_token_id=raw.get("pad_token_id"),
    )


def of_original(
    raw: dict[str, Any], sizes: Sizes, layer: str, args: dict[str, Any], bos: int | None, eos: int
) -> Config:
    """The model around the layers; `bos` and `eos` are those of the tokenizer its authors used."""
    must(raw, "rms_norm", (True,), True)
    match(raw, "d_model", sizes.d_model)
    match(raw, "n_layer", sizes.n_layer)
    config = Config(
        d_model=sizes.d_model,
        n_layer=sizes.n_layer,
        vocab_size=raw.get("vocab_size", sizes.rows),
        layer=layer,
        layer_args=args,
        tie_embeddings=sizes.tied(raw.get("tie_embeddings")),
        pad_vocab_size_multiple=raw.get("pad_vocab_size_multiple", 8),
        bos_token_id=raw.get("bos_token_id", bos),
        eos_token_id=raw.get("eos_token_id", eos),
    )
    agree(config, sizes)
    return config
