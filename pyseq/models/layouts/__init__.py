"""The checkpoint layouts: config.json and tensor names -> `Config` and the names of `CausalLM`; and back to a config
that transformers reads.

Every size is read from the tensors' shapes and must agree with what the config says, so a lying file is refused before
anything of its claimed size exists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyseq.models.config import Config
from pyseq.models.files import Tensors
from pyseq.models.layouts import mamba, mamba2, rwkv7
from pyseq.models.layouts.others import refuse_hybrid, refuse_original, refuse_tensors
from pyseq.models.layouts.sizes import EMBEDDING, HEAD, Sizes, agree
from pyseq.models.layouts.translated import Translated

Reader = Callable[[dict[str, Any], Tensors, dict[str, str]], Config]

OF_TRANSFORMERS: dict[str, Reader] = {
    "mamba": mamba.from_transformers,
    "falcon_mamba": mamba.from_transformers,
    "mamba2": mamba2.from_transformers,
}
WRITERS = {"Mamba": mamba.to_transformers, "Mamba2": mamba2.to_transformers}


# A matrix of a layer that has the type of the model: one per layer that `CausalLM` is made of.
TYPED = ("backbone.layers.0.mixer.in_proj.weight", "backbone.layers.0.att.receptance.weight")


def under_our_names(tensors: Tensors) -> tuple[Tensors, dict[str, str]]:
    """The tensors, and name in `CausalLM` -> name among them. RWKV-7's differ from ours in shape too."""
    return rwkv7.translate(tensors) or (tensors, _our_names(tensors))


def needs_config(tensors: Tensors) -> bool:
    """Whether the tensors alone do not say what the model is. RWKV-7's do."""
    return rwkv7.translate(tensors) is None


def _our_names(tensors: Tensors) -> dict[str, str]:
    """Codestral prefixes `model.`; the original code says `embedding`."""
    names: dict[str, str] = {}
    for name in tensors.names():
        ours = name.removeprefix("model.").replace("backbone.embedding.", "backbone.embeddings.")
        if ours in names:
            raise ValueError(f"tensors {names[ours]!r} and {name!r} have the same meaning")
        names[ours] = name
    return names


def read_config(raw: dict[str, Any], tensors: Tensors, names: dict[str, str]) -> Config:
    """`raw` is the config.json, or Mistral's params.json, of any layout this package reads."""
    if "pyseq" in raw:
        if not isinstance(raw["pyseq"], dict):
            raise ValueError(f"config: 'pyseq' must be an object, got {raw['pyseq']!r}")
        config = Config.from_dict(raw["pyseq"])
        agree(config, Sizes(tensors, names))
        return config
    if isinstance(tensors, Translated):
        return rwkv7.from_checkpoint(raw, tensors, names)
    read = _reader(raw)
    refuse_tensors(names)
    return read(raw, tensors, names)


def _reader(raw: dict[str, Any]) -> Reader:
    if "dim" in raw and "n_layers" in raw:  # whose model_type, where it has one, is not transformers'
        return mamba2.from_mistral
    kind = raw.get("model_type")
    if kind is None and "d_model" in raw and "n_layer" in raw:
        return {"Mamba1": mamba.from_original, "Mamba2": mamba2.from_original}[refuse_original(raw)]
    refuse_hybrid(kind)
    if not isinstance(kind, str) or kind not in OF_TRANSFORMERS:
        known = ", ".join(map(repr, [*OF_TRANSFORMERS, "rwkv7"]))
        raise ValueError(f"config: model_type is {kind!r}; this version reads {known} checkpoints")
    return OF_TRANSFORMERS[kind]


def transformers_config(config: Config) -> dict[str, Any]:
    """The config.json fields by which transformers reads a model of ours; none where it has no such model."""
    fields = WRITERS[config.layer](config) if config.layer in WRITERS else {}
    common = {
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "vocab_size": config.padded_vocab_size,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    return {**fields, **common} if fields else {}


__all__ = ["EMBEDDING", "HEAD", "TYPED", "needs_config", "read_config", "transformers_config", "under_our_names"]
