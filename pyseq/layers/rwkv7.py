"""RWKV-7 (Peng et al., 2025): a layer of a time mix, which remembers, and a channel mix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pyseq.layers.norm import LayerNorm
from pyseq.layers.rwkv7_channel import RWKV7ChannelMix
from pyseq.layers.rwkv7_start import Place, rank
from pyseq.layers.rwkv7_time import RWKV7TimeMix
from pyseq.ops._check import Dims, check_cu_seqlens
from pyseq.ops.delta_rule import WIDEST

Tensor = torch.Tensor


class RWKV7State(NamedTuple):
    """What an RWKV-7 layer remembers of the past, all float32."""

    time: Tensor  # [B, D], the last input of the time mix
    wkv: Tensor  # [B, H, N, N], keys by values
    channel: Tensor  # [B, D], the last input of the channel mix


class RWKV7(torch.nn.Module):
    """x = x + time_mix(ln1(x));  y = x + channel_mix(ln2(x))

    A whole residual layer, norms included: x, y [B, T, d_model] of one type. The equations are those of `RWKV7TimeMix`
    and `RWKV7ChannelMix` (pyseq.layers). Matrices have the layer's dtype; vectors and norms stay float32 when it is
    cast to a half type.

    The first layer of a model hands its values, v_first, to all others, which mix them with their own:

        y, state, v_first = layers[0](x, return_v_first=True)
        y, state = layers[1](y, v_first=v_first)

    A layer that is given no v_first keeps its values as they are, and returns those.

    head_size: N, a divisor of d_model. d_ffn: channels of the channel mix, None for 4 d_model.
    decay_rank, iclr_rank, value_rank, gate_rank: of the low-rank gates of w, alpha, v and g; None for the trainer's
    2.5, 2.5, 1.7 and 5 sqrt(d_model), in whole 32s.
    layer_idx, n_layer: the layer's place in its model, by which it begins; layer 0 has no parameters for v_first, and
    takes none. None and None: the values of a first layer, with those parameters.
    iclr_scale: 1, or 2 for a transition with eigenvalues down to -1; no published weights have 2.
    norm_eps: of ln1 and ln2; that of the norm over heads is head_size times it.

    A new layer is the identity: W_o and the channel mix's second projection begin at zero.
    """

    def __init__(
        self,
        d_model: int,
        head_size: int = 64,
        d_ffn: int | None = None,
        decay_rank: int | None = None,
        iclr_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
        layer_idx: int | None = None,
        n_layer: int | None = None,
        iclr_scale: int = 1,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _positive(d_model=d_model, head_size=head_size)
        if d_model % head_size:
            raise ValueError(f"head_size must divide d_model = {d_model}, got {head_size}")
        if head_size > WIDEST:
            raise ValueError(f"head_size must be at most {WIDEST}, got {head_size}")
        ranks = {
            "w": rank(2.5, d_model) if decay_rank is None else decay_rank,
            "a": rank(2.5, d_model) if iclr_rank is None else iclr_rank,
            "v": rank(1.7, d_model) if value_rank is None else value_rank,
            "g": rank(5, d_model) if gate_rank is None else gate_rank,
        }
        d_ffn = 4 * d_model if d_ffn is None else d_ffn
        _positive(d_ffn=d_ffn, decay_rank=ranks["w"], iclr_rank=ranks["a"], value_rank=ranks["v"], gate_rank=ranks["g"])
        _check_place(layer_idx, n_layer)
        if isinstance(iclr_scale, bool) or iclr_scale not in (1, 2):
            raise ValueError(f"iclr_scale must be 1 or 2, got {iclr_scale!r}")
        if isinstance(norm_eps, bool) or not isinstance(norm_eps, int | float) or not 0 < norm_eps < math.inf:
            raise ValueError(f"norm_eps must be a positive number, got {norm_eps!r}")
        self.d_model, self.head_size, self.d_ffn, self.heads = d_model, head_size, d_ffn, d_model // head_size
        self.layer_idx, self.n_layer, self.iclr_scale = layer_idx, n_layer, iclr_scale
        index = layer_idx or 0
        place = Place(index, index + 1 if n_layer is None else n_layer, d_model, head_size)
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.ln1 = LayerNorm(d_model, norm_eps, **kind)
        self.att = RWKV7TimeMix(
            d_model, head_size, ranks, place=place, value_residual=layer_idx != 0, iclr_scale=int(iclr_scale),
            norm_eps=norm_eps, **kind,
        )  # fmt: skip
        self.ln2 = LayerNorm(d_model, norm_eps, **kind)
        self.ffn = RWKV7ChannelMix(d_model, d_ffn, place=place, **kind)

    def reset_parameters(self) -> None:
        self.att.reset_parameters()
        self.ffn.reset_parameters()

    def forward(
        self,
        x: Tensor,
        state: RWKV7State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        v_first: Tensor | None = None,
        return_v_first: bool = False,
    ) -> Any:
        """x [B, T, d_model] -> (y, state after the last token), with return_v_first (y, state, v_first).

        v_first [B, T, d_model]: what the first layer returned. `state` is not changed; gradients flow through all.
        """
        self._check(x, "BTD", state, v_first, cu_seqlens)
        time, wkv, channel = (None, None, None) if state is None else state
        out, time, wkv, v_first = self.att(self.ln1(x), time, wkv, cu_seqlens, v_first)
        x = (x + out).to(x.dtype)
        out, channel = self.ffn(self.ln2(x), channel, cu_seqlens)
        y, after = (x + out).to(x.dtype), RWKV7State(time, wkv, channel)
        return (y, after, v_first) if return_v_first else (y, after)

    def step(
        self, x: Tensor, state: RWKV7State, *, v_first: Tensor | None = None, return_v_first: bool = False
    ) -> Any:
        """x and v_first [B, d_model], one token. With grad mode off, `state` is updated in place and returned."""
        self._check(x, "BD", state, v_first, None)
        if torch.is_grad_enabled():
            given = None if v_first is None else v_first[:, None]
            y, state, v_first = self(x[:, None], state, v_first=given, return_v_first=True)
            return (y[:, 0], state, v_first[:, 0]) if return_v_first else (y[:, 0], state)
        out, v_first = self.att.step(self.ln1(x), state.time, state.wkv, v_first)
        x = (x + out).to(x.dtype)
        y = (x + self.ffn.step(self.ln2(x), state.channel)).to(x.dtype)
        return (y, state, v_first) if return_v_first else (y, state)

    def stepper(self, state: RWKV7State) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]:
        """x, v_first [B, d_model] -> (y, v_first) for a loop in inference mode: `step` without its checks.

        x has the type of the norms: float32, or float64 in a float64 layer.
        """
        att, ffn = self.att.stepper(state.time, state.wkv), self.ffn.stepper(state.channel)
        ln1, ln2 = self.ln1.stepper(), self.ln2.stepper()

        def step(x: Tensor, v_first: Tensor | None) -> tuple[Tensor, Tensor]:
            out, v_first = att(ln1(x), v_first)
            x = x + out
            return x + ffn(ln2(x)), v_first

        return step

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> RWKV7State:
        """The state before the first token: zeros, on the layer's device, float32 unless the layer is float64.

        A state of dtype bfloat16 is for `step` alone: half the memory, and what it remembers is rounded at each token.
        """
        kind: dict[str, Any] = {"device": device or self.ln1.weight.device, "dtype": dtype or self.ln1.weight.dtype}
        return RWKV7State(
            torch.zeros(batch_size, self.d_model, **kind),
            torch.zeros(batch_size, self.heads, self.head_size, self.head_size, **kind),
            torch.zeros(batch_size, self.d_model, **kind),
        )

    def _check(self, x: Any, axes: str, state: Any, v_first: Any, cu_seqlens: Any) -> None:
        dims = Dims("RWKV7")
        dims.fix("D", self.d_model, "d_model")
        dims.match("x", x, axes)
        if cu_seqlens is not None:
            check_cu_seqlens(dims, cu_seqlens)
        if v_first is not None and self.layer_idx == 0:
            raise ValueError("RWKV7: v_first is given to layer 0, whose values it is: leave it out")
        dims.optional("v_first", v_first, axes)
        if state is not None:
            if not isinstance(state, tuple) or len(state) != 3:
                raise TypeError(f"RWKV7: state is {type(state).__name__}, expected an RWKV7State, or None")
            first = "B" if cu_seqlens is None else "S"
            dims.match("state.time", state[0], first + "D")
            dims.match("state.channel", state[2], first + "D")
            for letter, size in (("H", self.heads), ("N", self.head_size)):
                dims.fix(letter, size, "d_model and head_size")
            dims.match("state.wkv", state[1], first + "HNN")

    def extra_repr(self) -> str:
        text = f"d_model={self.d_model}, head_size={self.head_size}, d_ffn={self.d_ffn}"
        text = text if self.layer_idx is None else f"{text}, layer_idx={self.layer_idx}"
        return text if self.iclr_scale == 1 else f"{text}, iclr_scale={self.iclr_scale}"


def _positive(**sizes: Any) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")


def _check_place(layer_idx: Any, n_layer: Any) -> None:
    for name, value, least in (("layer_idx", layer_idx, 0), ("n_layer", n_layer, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name} must be None or an integer from {least}, got {value!r}")
    if n_layer is not None and (layer_idx or 0) >= n_layer:
        raise ValueError(f"layer_idx must be below n_layer = {n_layer}, got {layer_idx}")
