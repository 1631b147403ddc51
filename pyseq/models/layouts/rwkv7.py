"""RWKV-7: the authors' layout (`blocks.0.att.`), with `model.` before it in some files, and fla's (`model.layers.`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from pyseq.models.config import Config
from pyseq.models.files import Tensors
from pyseq.models.layouts.others import refuse_rwkv
from pyseq.models.layouts.sizes import Sizes, match, must, shape
from pyseq.models.layouts.translated import Source, Translated

FIRST = "backbone.layers.0."
LETTERS = "rwkvag"  # the order of the rows of att.mix, and of fla's former attn.x_x
END = 0  # the end of a text, in the World vocabulary and in the Pile's
Names = Iterator[tuple[str, Source]]

_BLOCK = re.compile(r"blocks\.(\d{1,5})\.(.+)")
_LAYER = re.compile(r"model\.layers\.(\d{1,5})\.(.+)")
_AROUND = {
    **{"emb": "embeddings", "ln_out": "norm_f", "head": "lm_head"},
    **{"model.embeddings": "embeddings", "model.norm": "norm_f", "lm_head": "lm_head"},
}
_SAME = {
    **{f"{norm}.{p}": f"{norm}.{p}" for norm in ("ln1", "ln2", "att.ln_x") for p in ("weight", "bias")},
    **{f"att.{name}.weight": f"att.{name}.weight" for name in ("receptance", "key", "value", "output")},
    **{f"ffn.{name}.weight": f"ffn.{name}.weight" for name in ("key", "value")},
}
_OF_FLA = {
    **{f"{n}.{p}": f"{ours}.{p}" for n, ours in (("attn_norm", "ln1"), ("ffn_norm", "ln2"), ("attn.g_norm", "att.ln_x"))
       for p in ("weight", "bias")},
    **{f"attn.{n[0]}_proj.weight": f"att.{n}.weight" for n in ("receptance", "key", "value")},
    "attn.o_proj.weight": "att.output.weight",
    **{f"attn.{m}_lora.lora.0.weight": f"att.{m}1.weight" for m in "wavg"},
    **{f"attn.{m}_lora.lora.2.weight": f"att.{m}2.weight" for m in "wavg"},
    **{f"ffn.{name}.weight": f"ffn.{name}.weight" for name in ("key", "value")},
}  # fmt: skip


def translate(tensors: Tensors) -> tuple[Translated, dict[str, str]] | None:
    """The tensors under our names, and our name -> how the file calls it; None if they are not of an RWKV."""
    files = tensors.names()
    refuse_rwkv(files)
    inner = {name.removeprefix("model.") for name in files}
    if any(_LAYER.match(name) and ".attn.r_proj." in name for name in files):
        sources = dict(_named(files, _fla, _LAYER, ""))
    elif any(_BLOCK.match(name) and ".att.receptance." in name for name in inner):
        prefix = "model." if any(name.startswith("model.blocks.") for name in files) else ""
        sources = dict(_named(files, _authors, _BLOCK, prefix))
    else:
        return None
    used = {file for source in sources.values() for file in source.files}
    sources |= {file: Source((file,)) for file in files if file not in used and not _of_layer_0(file)}
    shown = {ours: " ".join(source.files) for ours, source in sources.items()}
    return Translated(tensors, {shown[ours]: source for ours, source in sources.items()}), shown


def _of_layer_0(file: str) -> bool:
    """The first layer's share in v_first, which is its own value: trainers write it, nothing reads it."""
    return bool(re.fullmatch(r"(model\.)?blocks\.0\.att\.v[012]|model\.layers\.0\.attn\.v_lora\.lora\..*", file))


def _named(files: list[str], rule: Callable[[str], tuple[str, Source] | None], inside: Any, prefix: str) -> Names:
    """What each name means; `rule` has those within a layer. The six vectors of the mix are one tensor of ours."""
    mixes: dict[str, dict[str, str]] = {}
    for file in files:
        name = file.removeprefix(prefix)
        stem, _, leaf = name.rpartition(".")
        if stem in _AROUND:
            ours = _AROUND[stem]
            yield f"{'' if ours == 'lm_head' else 'backbone.'}{ours}.{leaf}", Source((file,))
        elif (found := inside.fullmatch(name)) and not _of_layer_0(file):
            layer, rest = f"backbone.layers.{int(found[1])}.", found[2]
            if found[1] == "0" and rest in ("ln0.weight", "ln0.bias", "pre_norm.weight", "pre_norm.bias"):
                yield f"backbone.norm_0.{leaf}", Source((file,))
            elif mix := re.fullmatch(rf"attn?\.x_([{LETTERS}])", rest):
                mixes.setdefault(layer, {})[mix[1]] = file
            elif meaning := rule(rest):
                yield layer + meaning[0], Source((file,), *meaning[1][1:])
    for layer, rows in mixes.items():
        for letter in LETTERS:
            if letter not in rows:
                like = next(iter(rows.values()))[:-1]
                raise ValueError(f"checkpoint: tensor {like + letter!r} is missing")
        yield layer + "att.mix", Source(tuple(rows[letter] for letter in LETTERS), "rows")


def _authors(name: str) -> tuple[str, Source] | None:
    if name in _SAME:
        return _SAME[name], Source(())
    if re.fullmatch(r"att\.[wavg][12]", name):
        return name + ".weight", Source((), "transpose")
    if re.fullmatch(r"att\.([wav]0|k_k|k_a)", name):
        return name, Source((), "flat")
    return _either(name)


def _fla(name: str) -> tuple[str, Source] | None:
    if name in _OF_FLA:
        return _OF_FLA[name], Source(())
    if bias := re.fullmatch(r"attn\.([wav])_lora\.lora\.2\.bias", name):
        return f"att.{bias[1]}0", Source((), "flat")
    if name in ("attn.k_k", "attn.k_a"):
        return name.replace("attn", "att"), Source((), "flat")
    if name == "attn.x_x":
        return "att.mix", Source((), "rows in one")
    return _either(name.replace("attn.", "att."))


def _either(name: str) -> tuple[str, Source] | None:
    if name == "att.r_k":
        return name, Source((), "heads")
    return ("ffn.mix", Source((), "flat")) if name == "ffn.x_k" else None


def from_checkpoint(raw: dict[str, Any], tensors: Tensors, names: dict[str, str]) -> Config:
    """Every size is that of a tensor; the config, where there is one, must say the same."""
    kind = raw.get("model_type")
    if kind is not None and not (isinstance(kind, str) and re.match(r"rwkv[-_]?7", kind.lower())):
        raise ValueError(f"config: model_type is {kind!r}, but the tensors are those of RWKV-7")
    if raw.get("attn") is not None:
        raise ValueError("config: attn is set, a hybrid with attention layers: this version reads none")
    sizes = Sizes(tensors, names)
    if "backbone.norm_0.weight" not in names:
        raise ValueError("checkpoint: no norm behind the embedding (blocks.0.ln0, pre_norm): this version needs one")
    if not sizes.head and raw.get("tie_word_embeddings") is None:
        raise ValueError("checkpoint: tensor 'head.weight' is missing, and no config says that it is the embedding")
    heads, head = shape(tensors, names, FIRST + "att.r_k", 2)
    args = {
        "head_size": head,
        "d_ffn": shape(tensors, names, FIRST + "ffn.key.weight", 2)[0],
        "decay_rank": shape(tensors, names, FIRST + "att.w1.weight", 2)[0],
        "iclr_rank": shape(tensors, names, FIRST + "att.a1.weight", 2)[0],
        "gate_rank": shape(tensors, names, FIRST + "att.g1.weight", 2)[0],
    }
    if sizes.n_layer > 1:
        args["value_rank"] = shape(tensors, names, "backbone.layers.1.att.v1.weight", 2)[0]
    for key, found in {
        "hidden_size": sizes.d_model,
        "attention_hidden_size": sizes.d_model,
        "num_hidden_layers": sizes.n_layer,
        "vocab_size": sizes.rows,
        "head_dim": head,
        "head_size": head,
        "num_heads": heads,
        "intermediate_size": args["d_ffn"],
        "decay_low_rank_dim": args["decay_rank"],
        "a_low_rank_dim": args["iclr_rank"],
        "gate_low_rank_dim": args["gate_rank"],
    }.items():
        match(raw, key, found)
    if sizes.n_layer > 1:
        for key in ("v_low_rank_dim", "value_low_rank_dim"):
            match(raw, key, args["value_rank"])
    wide = raw.get("value_dim")
    for value in wide if isinstance(wide, list) else [wide]:
        match({"value_dim": value}, "value_dim", sizes.d_model)
    must(raw, "hidden_act", ("sqrelu", "relu2"), "sqrelu")
    must(raw, "norm_first", (True,), True)
    must(raw, "norm_bias", (True,), True)
    return Config(
        d_model=sizes.d_model,
        n_layer=sizes.n_layer,
        vocab_size=sizes.rows,
        layer="RWKV7",
        layer_args=args,
        tie_embeddings=sizes.tied(raw.get("tie_word_embeddings")),
        norm_eps=raw.get("norm_eps", raw.get("layer_norm_epsilon", 1e-5)),
        pad_vocab_size_multiple=1,
        bos_token_id=raw.get("bos_token_id", END),
        eos_token_id=raw.get("eos_token_id", END),
        pad_token_id=raw.get("pad_token_id"),
    )
