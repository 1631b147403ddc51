"""The checkpoint layouts: config.json and tensor names -> `Config` and the names of `CausalLM`.

Every size is read from the tensors' shapes and must agree with what the config says, so a lying file is refused before
anything of its claimed size exists.
"""

from __future__ import annotations

import math
import re
from typing import Any

from pyseq.models.config import Config
from pyseq.models.files import Tensors

LAYER = re.compile(r"backbone\.layers\.(\d{1,5})\.")
EMBEDDING, HEAD = "backbone.embeddings.weight", "lm_head.weight"


def our_names(tensors: Tensors) -> dict[str, str]:
    """Name in `CausalLM` -> name in the file. Codestral prefixes `model.`; the original code says `embedding`."""
    names: dict[str, str] = {}
    for name in tensors.names():
        ours = name.removeprefix("model.").replace("backbone.embedding.", "backbone.embeddings.")
        if ours in names:
            raise ValueError(f"tensors {names[ours]!r} and {name!r} have the same meaning")
        names[ours] = name
    return names


def read_config(raw: dict[str, Any], tensors: Tensors, names: dict[str, str]) -> Config:
    """`raw` is the config.json of any layout this package reads."""
    if "pyseq" in raw:
        if not isinstance(raw["pyseq"], dict):
            raise ValueError(f"config: 'pyseq' must be an object, got {raw['pyseq']!r}")
        config = Config.from_dict(raw["pyseq"])
        _agree(config, Sizes(tensors, names))
        return config
    kind = raw.get("model_type")
    if kind is None and "d_model" in raw and "n_layer" in raw:
        return _original(raw, MambaSizes(tensors, names))
    if kind not in ("mamba", "falcon_mamba"):
        raise ValueError(f"config: model_type is {kind!r}; this version reads 'mamba' and 'falcon_mamba' checkpoints")
    return _transformers(raw, MambaSizes(tensors, names), falcon=kind == "falcon_mamba")


def _shape(tensors: Tensors, names: dict[str, str], name: str, dims: int) -> list[int]:
    if name not in names:
        raise ValueError(f"checkpoint: tensor {name!r} is missing")
    shape = tensors.shape(names[name])
    if len(shape) != dims or 0 in shape:
        raise ValueError(f"checkpoint: {names[name]} has shape {shape}, expected {dims} non-empty dimensions")
    return shape


class Sizes:
    """The geometry of a checkpoint around any layer, from the names and shapes of its tensors."""

    def __init__(self, tensors: Tensors, names: dict[str, str]) -> None:
        layers = {int(found.group(1)) for name in names if (found := LAYER.match(name))}
        self.n_layer = len(layers)
        if not layers or max(layers) + 1 != self.n_layer:
            raise ValueError(f"checkpoint: layers must be numbered from 0 without gaps, got {sorted(layers)[:8]}")
        self.rows, self.d_model = _shape(tensors, names, EMBEDDING, 2)
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


class MambaSizes(Sizes):
    """The same with the geometry of the Mamba layers."""

    def __init__(self, tensors: Tensors, names: dict[str, str]) -> None:
        super().__init__(tensors, names)
        first = "backbone.layers.0.mixer."
        if first + "A_log" in names and len(tensors.shape(names[first + "A_log"])) == 1:
            raise ValueError("checkpoint: A_log has one dimension: Mamba-2, which this version does not read")
        self.d_inner, self.d_state = _shape(tensors, names, first + "A_log", 2)
        self.d_conv = _shape(tensors, names, first + "conv1d.weight", 3)[2]
        self.dt_rank = _shape(tensors, names, first + "dt_proj.weight", 2)[1]
        self.bias = first + "in_proj.bias" in names
        self.conv_bias = first + "conv1d.bias" in names

    def layer_args(self) -> dict[str, Any]:
        keys = ("d_inner", "d_state", "d_conv", "dt_rank", "bias", "conv_bias")
        return {key: getattr(self, key) for key in keys}


def _transformers(raw: dict[str, Any], sizes: MambaSizes, falcon: bool) -> Config:
    _must(raw, "hidden_act", ("silu", "swish"), "silu")
    _match(raw, "hidden_size", sizes.d_model)
    _match(raw, "num_hidden_layers", sizes.n_layer)
    _match(raw, "vocab_size", sizes.rows)
    _match(raw, "state_size", sizes.d_state)
    _match(raw, "conv_kernel", sizes.d_conv)
    _match(raw, "use_bias", sizes.bias)
    _match(raw, "use_conv_bias", sizes.conv_bias)
    _match_rank(raw.get("time_step_rank", "auto"), "time_step_rank", sizes)
    if raw.get("intermediate_size") is not None:  # FalconMamba's config also says expand = 16, and means 2
        _match(raw, "intermediate_size", sizes.d_inner)
    else:
        _match_expand(raw.get("expand", 2), sizes)
    args = sizes.layer_args()
    if falcon:
        args["mixer_rms_eps"] = raw.get("mixer_rms_eps", 1e-6)
    return Config(
        d_model=sizes.d_model,
        n_layer=sizes.n_layer,
        vocab_size=sizes.rows,
        layer_args=args,
        tie_embeddings=sizes.tied(raw.get("tie_word_embeddings")),
        norm_eps=raw.get("layer_norm_epsilon", 1e-5),
        pad_vocab_size_multiple=1,
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=raw.get("eos_token_id"),
        pad_token_id=raw.get("pad_token_id"),
    )


def _original(raw: dict[str, Any], sizes: MambaSizes) -> Config:
    options = raw.get("ssm_cfg") or {}
    if not isinstance(options, dict):
        raise ValueError(f"config: ssm_cfg must be an object, got {options!r}")
    _must(options, "layer", ("Mamba1",), "Mamba1")
    _must(raw, "attn_layer_idx", ([], None), [])
    _must(raw, "d_intermediate", (0,), 0)
    _must(raw, "rms_norm", (True,), True)
    _match(raw, "d_model", sizes.d_model)
    _match(raw, "n_layer", sizes.n_layer)
    _match(options, "d_state", sizes.d_state)
    _match(options, "d_conv", sizes.d_conv)
    _match(options, "bias", sizes.bias)
    _match(options, "conv_bias", sizes.conv_bias)
    _match_rank(options.get("dt_rank", "auto"), "ssm_cfg.dt_rank", sizes)
    _match_expand(options.get("expand", 2), sizes)
    config = Config(
        d_model=sizes.d_model,
        n_layer=sizes.n_layer,
        vocab_size=raw.get("vocab_size", sizes.rows),
        layer_args=sizes.layer_args(),
        tie_embeddings=sizes.tied(raw.get("tie_embeddings")),
        pad_vocab_size_multiple=raw.get("pad_vocab_size_multiple", 8),
        eos_token_id=0,  # <|endoftext|> of the GPT-NeoX tokenizer that every original checkpoint uses
    )
    _agree(config, sizes)
    return config


def transformers_config(config: Config) -> dict[str, Any]:
    """The config.json fields by which transformers reads a Mamba or FalconMamba of ours; none for another layer."""
    if config.layer != "Mamba":
        return {}
    args = config.layer_args
    falcon = args.get("mixer_rms_eps") is not None
    inner = args.get("d_inner") or int(args.get("expand", 2) * config.d_model)
    rank = args.get("dt_rank", "auto")
    return {
        "architectures": ["FalconMambaForCausalLM" if falcon else "MambaForCausalLM"],
        "model_type": "falcon_mamba" if falcon else "mamba",
        "hidden_size": config.d_model,
        "intermediate_size": inner,
        "expand": inner // config.d_model,
        "num_hidden_layers": config.n_layer,
        "vocab_size": config.padded_vocab_size,
        "state_size": args.get("d_state", 16),
        "conv_kernel": args.get("d_conv", 4),
        "time_step_rank": math.ceil(config.d_model / 16) if rank == "auto" else rank,
        "use_bias": args.get("bias", False),
        "use_conv_bias": args.get("conv_bias", True),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        **({"mixer_rms_eps": args["mixer_rms_eps"]} if falcon else {}),
    }


def _agree(config: Config, sizes: Sizes) -> None:
    pairs = [("d_model", config.d_model, sizes.d_model), ("n_layer", config.n_layer, sizes.n_layer)]
    pairs.append(("vocab_size, padded,", config.padded_vocab_size, sizes.rows))
    for name, claimed, found in pairs:
        if claimed != found:
            raise ValueError(f"config: {name} is {claimed}, but the tensors say {found}")
    sizes.tied(config.tie_embeddings)


def _match(raw: dict[str, Any], key: str, found: int | bool) -> None:
    claimed = raw.get(key)
    if claimed is not None and (type(claimed) is not type(found) or claimed != found):
        raise ValueError(f"config: {key} is {claimed!r}, but the tensors say {found}")


def _match_rank(claimed: Any, key: str, sizes: MambaSizes) -> None:
    _match({key: math.ceil(sizes.d_model / 16) if claimed == "auto" else claimed}, key, sizes.dt_rank)


def _match_expand(expand: Any, sizes: MambaSizes) -> None:
    if not isinstance(expand, int | float) or not 0 <= expand * sizes.d_model - sizes.d_inner < 1:  # rounded down
        raise ValueError(f"config: expand is {expand!r}, but the tensors say {sizes.d_inner} / {sizes.d_model}")


def _must(raw: dict[str, Any], key: str, allowed: tuple[Any, ...], default: Any) -> None:
    value = raw.get(key, default)
    if value not in allowed:
        raise ValueError(f"config: {key} is {value!r}; this version reads checkpoints where it is {allowed[0]!r}")


def _same(tensors: Tensors, names: dict[str, str]) -> bool:
    head, embedding = names[HEAD], names[EMBEDDING]
    if tensors.shape(head) != tensors.shape(embedding):
        return False
    return bool((tensors.read(head) == tensors.read(embedding)).all())
