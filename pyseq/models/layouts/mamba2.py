"""Mamba-2: the layouts of transformers, of the original code, and of Mistral (Mamba-Codestral's second)."""

from __future__ import annotations

import inspect
import math
from typing import Any

from pyseq.layers.mamba2 import Mamba2
from pyseq.models.config import Config
from pyseq.models.files import Tensors
from pyseq.models.layouts.sizes import FIRST, Sizes, match, match_expand, of_original, of_transformers, shape

# Of an original checkpoint's layer: the arguments that mamba-ssm has too. Those that are ours alone go by keyword.
OPTIONS = {"layer"} | {
    name for name, p in inspect.signature(Mamba2).parameters.items() if p.kind is not p.KEYWORD_ONLY
} - {"d_model", "device", "dtype"}


class Mamba2Sizes(Sizes):
    """With the geometry of the layers. G and N are known by their product, the width of B."""

    def __init__(self, tensors: Tensors, names: dict[str, str]) -> None:
        super().__init__(tensors, names)
        if FIRST + "A_log" in names and len(tensors.shape(names[FIRST + "A_log"])) == 2:
            raise ValueError(
                "checkpoint: A_log has two dimensions, as in Mamba; the config says Mamba-2 (model_type, ssm_cfg.layer)"
            )
        (self.heads,) = shape(tensors, names, FIRST + "A_log", 1)
        rows = shape(tensors, names, FIRST + "in_proj.weight", 2)[0]
        channels, _, self.d_conv = shape(tensors, names, FIRST + "conv1d.weight", 3)
        self.d_inner = shape(tensors, names, FIRST + "out_proj.weight", 2)[1]
        both = rows - 2 * self.d_inner - self.heads  # [z0, x0, z, x, B, C, dt]: z0 and z, x0 and x are d_inner each
        self.d_ssm, self.width = channels - both, both // 2
        if both < 2 or both % 2 or not 0 < self.d_ssm <= self.d_inner or self.d_ssm % self.heads:
            raise ValueError(
                f"checkpoint: {FIRST}in_proj ({rows} rows), conv1d ({channels} channels), out_proj ({self.d_inner} "
                f"columns) and A_log ({self.heads} heads) do not fit together in a Mamba-2 layer"
            )
        self.headdim = self.d_ssm // self.heads
        self.rmsnorm = FIRST + "norm.weight" in names
        self.D_has_hdim = shape(tensors, names, FIRST + "D", 1) != [self.heads]
        self.bias = FIRST + "in_proj.bias" in names
        self.conv_bias = FIRST + "conv1d.bias" in names

    def layer_args(self, groups: Any, state: Any, name: str) -> dict[str, Any]:
        """`groups` and `state` are G and N as the config says them, or means them; `name` is its name for both."""
        for value in (groups, state):
            if type(value) is not int or value < 1:
                raise ValueError(f"config: {name} must be positive integers, got {groups!r} and {state!r}")
        if groups * state != self.width or self.heads % groups:
            raise ValueError(
                f"config: {name} are {groups} and {state}, but the tensors say {self.width} together "
                f"and {self.heads} heads"
            )
        keys = ("d_inner", "headdim", "d_conv", "bias", "conv_bias")
        args = {"d_state": state, "ngroups": groups, **{key: getattr(self, key) for key in keys}}
        rare = {"d_ssm": self.d_ssm, "rmsnorm": self.rmsnorm, "D_has_hdim": self.D_has_hdim}
        usual = {"d_ssm": self.d_inner, "rmsnorm": True, "D_has_hdim": False}
        return {**args, **{key: value for key, value in rare.items() if value != usual[key]}}


def from_transformers(raw: dict[str, Any], tensors: Tensors, names: dict[str, str]) -> Config:
    """norm_before_gate, which older configs carry, is not read: transformers never did, and gates first."""
    sizes = Mamba2Sizes(tensors, names)
    match(raw, "num_heads", sizes.heads)
    match(raw, "head_dim", sizes.headdim)
    match(raw, "conv_kernel", sizes.d_conv)
    match(raw, "use_bias", sizes.bias)
    match(raw, "use_conv_bias", sizes.conv_bias)
    match(raw, "intermediate_size", sizes.d_inner)
    match_expand(raw.get("expand", 2), sizes.d_inner, sizes.d_model)
    if not sizes.rmsnorm or sizes.D_has_hdim or sizes.d_ssm != sizes.d_inner:
        raise ValueError("checkpoint: model_type is 'mamba2', but transformers has no such layer: norm, D or in_proj")
    args = sizes.layer_args(raw.get("n_groups", 8), raw.get("state_size", 128), "n_groups and state_size")
    args["norm_eps"] = raw.get("layer_norm_epsilon", 1e-5)
    return of_transformers(raw, sizes, "Mamba2", {**args, **limit(raw, "time_step_limit")}, tie=False)


def from_original(raw: dict[str, Any], tensors: Tensors, names: dict[str, str]) -> Config:
    # 0 is <|endoftext|> of the GPT-NeoX tokenizer that every original checkpoint uses.
    return _original(raw, tensors, names, "ssm_cfg.ngroups and d_state", bos=None, eos=0)


def from_mistral(raw: dict[str, Any], tensors: Tensors, names: dict[str, str]) -> Config:
    """params.json beside consolidated.safetensors: the original code's model under other names."""
    translated = {"d_model": raw["dim"], "n_layer": raw["n_layers"], "ssm_cfg": {"ngroups": raw.get("n_groups", 1)}}
    # 1 and 2 are <s> and </s> of Mistral's tokenizer.
    return _original({**raw, **translated}, tensors, names, "n_groups and the state size", bos=1, eos=2)


def _original(
    raw: dict[str, Any], tensors: Tensors, names: dict[str, str], widths: str, bos: int | None, eos: int
) -> Config:
    sizes, options = Mamba2Sizes(tensors, names), raw.get("ssm_cfg") or {}
    if unknown := sorted(set(options) - OPTIONS):
        raise ValueError(f"config: ssm_cfg has {unknown[0]!r}, which is no option of Mamba2")
    for key in ("d_conv", "headdim", "bias", "conv_bias", "d_ssm", "rmsnorm", "D_has_hdim"):
        match(options, key, getattr(sizes, key))
    match_expand(options.get("expand", 2), sizes.d_inner, sizes.d_model)
    args = sizes.layer_args(options.get("ngroups", 1), options.get("d_state", 128), widths)
    before = options.get("norm_before_gate", False)
    if type(before) is not bool:
        raise ValueError(f"config: ssm_cfg.norm_before_gate must be true or false, got {before!r}")
    args |= {"norm_before_gate": True} if before else {}
    return of_original(raw, sizes, "Mamba2", {**args, **limit(options, "dt_limit")}, bos, eos)


def limit(raw: dict[str, Any], key: str) -> dict[str, Any]:
    """{"dt_limit": [low, high]}, or nothing for (0, inf), which is what is meant where the config says nothing.

    Infinity is spelt in three ways: as JSON has no word for it, bare; as a string; and {"__float__": "Infinity"}.
    """
    value = raw.get(key)
    if value is None:
        return {}
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"config: {key} must be [low, high], got {value!r}")
    low, high = (_number(v, key) for v in value)
    if not 0 <= low <= high or math.isinf(low):
        raise ValueError(f"config: {key} must satisfy 0 <= low <= high, got {value!r}")
    return {} if (low, high) == (0.0, math.inf) else {"dt_limit": [low, high]}


def _number(value: Any, key: str) -> float:
    if isinstance(value, dict) and set(value) == {"__float__"}:
        value = value["__float__"]
    if isinstance(value, str) and value.lower().lstrip("+") in ("infinity", "inf"):
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"config: {key} must be two numbers, got {value!r}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"config: {key} holds a number of {len(str(value))} digits") from error


def to_transformers(config: Config) -> dict[str, Any]:
    """Nothing where the layer is none that transformers has."""
    args = config.layer_args
    inner = args.get("d_inner") or int(args.get("expand", 2) * config.d_model)
    theirs = (
        args.get("d_ssm") in (None, inner) and inner % config.d_model == 0
        and args.get("rmsnorm", True) and not args.get("norm_before_gate") and not args.get("D_has_hdim")
        and args.get("norm_eps", 1e-5) == config.norm_eps
    )  # fmt: skip
    if not theirs:
        return {}
    headdim, bounds = args.get("headdim", 64), args.get("dt_limit", (0.0, math.inf))
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "num_heads": inner // headdim,
        "head_dim": headdim,
        "expand": inner // config.d_model,
        "n_groups": args.get("ngroups", 1),
        "state_size": args.get("d_state", 128),
        "conv_kernel": args.get("d_conv", 4),
        "chunk_size": args.get("chunk_size", 256),
        "use_bias": args.get("bias", False),
        "use_conv_bias": args.get("conv_bias", True),
        **({} if tuple(bounds) == (0.0, math.inf) else {"time_step_limit": list(bounds)}),
    }
