"""CrossWKV: tokens of one stream read what the recurrence of RWKV-7 has made of another (Xiao, Li and Lin, 2025)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from pyseq.layers.cross_wkv_write import CrossWriter
from pyseq.layers.exact import Exact, exact_dtype
from pyseq.layers.linear import Linear
from pyseq.layers.norm import LayerNorm
from pyseq.layers.rwkv7_start import Place, orthogonal, rank, stretch
from pyseq.layers.token_shift import token_shift
from pyseq.ops._check import Dims
from pyseq.ops.delta_rule import WIDEST, rwkv7, rwkv7_step

Tensor = torch.Tensor
MODES = ("context_memory", "write_both", "aligned")


class CrossWKVState(NamedTuple):
    """The context absorbed so far, and where x stands, float32."""

    context: Tensor  # [B, d_context], the last token of the context
    x: Tensor  # [B, d_model], the last token of x
    wkv: Tensor  # [B, H, N, N], keys by values


class CrossWKV(Exact):
    """S[t] = (diag(w) - kappa (c alpha kappa)^T)^T S[t-1] + k v^T     per token of the context;  c = iclr_scale
    y[i] = S^T r[i]                                                 per token of x
    out = W_o (g ln_x(y))

    x, out: [B, T, d_model], say of an image; context: [B, T_c, d_context], say of a text. r and the gate g come from x;
    k, v, w, alpha and kappa from the context, all by the formulas of `RWKV7TimeMix`, each stream with a token shift of
    its own. There is no bonus, as x has no k, and no value residual. The layer begins at out = 0: add it to x.

    This is our reading of the paper's abstract, which leaves open which stream makes which of these. Three modes:

    - "context_memory": the context is absorbed, in its order, and then every token of x reads the same S.
    - "write_both": x comes after the context in one sequence. A token of x writes, through projections of its own, and
      reads what is there then: causal in x.
    - "aligned": x and the context are equally long; token t of the context is written, and token t of x reads.

    head_size N divides d_model. decay_rank, iclr_rank, gate_rank: of the low-rank gates of w, alpha and g; None for
    2.5, 2.5 and 5 sqrt(d_model), in whole 32s. iclr_scale 2: eigenvalues down to -1. Vectors and ln_x stay float32 when
    the layer is cast to a half type.
    """

    exact = ("mix",)

    def __init__(
        self,
        d_model: int,
        d_context: int,
        head_size: int = 64,
        mode: str = "context_memory",
        decay_rank: int | None = None,
        iclr_rank: int | None = None,
        gate_rank: int | None = None,
        iclr_scale: int = 1,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        ranks = {
            "decay_rank": rank(2.5, d_model) if decay_rank is None else decay_rank,
            "iclr_rank": rank(2.5, d_model) if iclr_rank is None else iclr_rank,
            "gate_rank": rank(5, d_model) if gate_rank is None else gate_rank,
        }
        sizes = {"d_model": d_model, "d_context": d_context, "head_size": head_size, **ranks}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        if d_model % head_size:
            raise ValueError(f"head_size must divide d_model = {d_model}, got {head_size}")
        if head_size > WIDEST:
            raise ValueError(f"head_size must be at most {WIDEST}, got {head_size}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if isinstance(iclr_scale, bool) or iclr_scale not in (1, 2):
            raise ValueError(f"iclr_scale must be 1 or 2, got {iclr_scale!r}")
        if isinstance(norm_eps, bool) or not isinstance(norm_eps, int | float) or not 0 < norm_eps < math.inf:
            raise ValueError(f"norm_eps must be a positive number, got {norm_eps!r}")
        self.d_model, self.d_context, self.head_size, self.mode = d_model, d_context, head_size, mode
        self.heads, self.iclr_scale = d_model // head_size, iclr_scale
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        gates = ranks["decay_rank"], ranks["iclr_rank"]
        self.write_context = CrossWriter(d_context, d_model, head_size, *gates, iclr_scale, **kind)
        own = mode == "write_both"
        self.write_x = CrossWriter(d_model, d_model, head_size, *gates, iclr_scale, **kind) if own else None
        self.receptance = Linear(d_model, d_model, bias=False, **kind)
        self.g1 = Linear(d_model, ranks["gate_rank"], bias=False, **kind)
        self.g2 = Linear(ranks["gate_rank"], d_model, bias=False, **kind)
        self.mix = torch.nn.Parameter(torch.empty(2, d_model, device=device, dtype=exact_dtype(dtype)))
        self.ln_x = LayerNorm(d_model, head_size * norm_eps, **kind)
        self.output = Linear(d_model, d_model, bias=False, **kind)
        self.mix._no_weight_decay = True  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the time mix of a first RWKV-7 layer; W_o is zero, so that the layer begins by saying nothing."""
        for writer in (self.write_context, self.write_x):
            if writer is not None:
                writer.reset_parameters()
        self.mix.copy_(Place(0, 1, self.d_model, self.head_size).mix()[[0, 5]])
        bound = 0.5 / math.sqrt(self.d_model)
        self.receptance.weight.uniform_(-bound, bound)
        self.g1.weight.zero_()
        orthogonal(self.g2.weight, 0.1 * stretch(self.g2.in_features, self.g2.out_features))
        self.ln_x.weight.fill_(1.0)
        self.ln_x.bias.zero_()
        self.output.weight.zero_()

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        state: CrossWKVState | None = None,
        *,
        context_mask: Tensor | None = None,
    ) -> tuple[Tensor, CrossWKVState]:
        """x [B, T, d_model], context [B, T_c, d_context] -> (out, state after both).

        The context is absorbed into what `state` holds, and then x goes on from there; without a context x reads what
        `state` has absorbed. context_mask [B, T_c], bool: a token where it is False is as if it were not there; in mode
        "aligned" x reads there all the same. `state` is not changed; gradients flow through both.
        """
        if x is None:
            raise TypeError("CrossWKV: x is None, expected a tensor [B, T, d_model]; absorb takes a context alone")
        self._check(x, context, context_mask, state)
        if context is None and (state is None or self.mode == "aligned"):
            raise ValueError("CrossWKV: context is None, expected a tensor [B, T_c, d_context] to read from")
        if self.mode == "aligned":
            state = self.init_state(len(x)) if state is None else state
            writes, last = self.write_context(context, state.context, context_mask)
        elif context is not None:
            state = self.absorb(context, state, context_mask=context_mask)
            last = state.context
        else:
            assert state is not None
            last = state.context.clone()
        before, past = token_shift(x.to(self.mix.dtype), state.x, None)
        r, gate = self._read(x, before)
        if self.mode == "context_memory":
            y, S = torch.einsum("bthk,bhkv->bthv", r.to(state.wkv.dtype), state.wkv), state.wkv.clone()
        else:
            if self.write_x is not None:
                writes, _ = self.write_x(x, state.x, None)
            y, S = rwkv7(r, *writes, state=state.wkv, return_state=True)
        return self._merge(y, gate), CrossWKVState(last, past, S)

    def absorb(
        self, context: Tensor, state: CrossWKVState | None = None, *, context_mask: Tensor | None = None
    ) -> CrossWKVState:
        """The state after a context [B, T_c, d_context], for any number of calls without one."""
        if self.mode == "aligned":
            raise ValueError("CrossWKV: mode 'aligned' absorbs the context while x reads: give the layer both")
        self._check(None, context, context_mask, state)
        state = self.init_state(len(context)) if state is None else state
        writes, last = self.write_context(context, state.context, context_mask)
        _, S = rwkv7(torch.zeros_like(writes.k), *writes, state=state.wkv, return_state=True)
        return CrossWKVState(last, state.x.clone(), S)

    def step(
        self, x: Tensor, state: CrossWKVState, context: Tensor | None = None
    ) -> tuple[Tensor, CrossWKVState]:
        """x [B, d_model], one token, in mode "aligned" with its context [B, d_context] -> (out, state).

        With grad mode off, `state` is updated in place and returned.
        """
        if (context is None) == (self.mode == "aligned"):
            raise ValueError(f"CrossWKV: context of a step: in mode 'aligned' and only there, mode is {self.mode!r}")
        self._check(x, context, None, state, time=False)
        if torch.is_grad_enabled():
            out, state = self(x[:, None], None if context is None else context[:, None], state)
            return out[:, 0], state
        r, gate = self._read(x, state.x)
        if self.mode == "context_memory":
            y = torch.einsum("bhk,bhkv->bhv", r.to(state.wkv.dtype), state.wkv)
        elif self.write_x is not None:
            y = rwkv7_step(state.wkv, r, *self.write_x.mixed(x.to(self.mix.dtype), state.x))
        else:
            assert context is not None
            y = rwkv7_step(state.wkv, r, *self.write_context.mixed(context.to(self.mix.dtype), state.context))
            state.context.copy_(context)
        state.x.copy_(x)
        return self._merge(y, gate), state

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> CrossWKVState:
        """The state that has absorbed nothing: zeros, on the layer's device, float32 unless the layer is float64."""
        kind: dict[str, Any] = {"device": device or self.mix.device, "dtype": dtype or self.mix.dtype}
        return CrossWKVState(
            torch.zeros(batch_size, self.d_context, **kind),
            torch.zeros(batch_size, self.d_model, **kind),
            torch.zeros(batch_size, self.heads, self.head_size, self.head_size, **kind),
        )

    def _read(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """r [..., H, N] and the gate [..., D] of tokens x, with those before them."""
        wide, kind = self.mix.dtype, self.receptance.kind
        x = x.to(wide)
        x_r, x_g = (torch.addcmul(x, before - x, mix).to(kind) for mix in self.mix)
        gate = self.g2(torch.sigmoid(self.g1(x_g).to(wide)).to(kind))
        return self.receptance(x_r).unflatten(-1, (self.heads, self.head_size)), gate

    def _merge(self, y: Tensor, gate: Tensor) -> Tensor:
        wide = self.mix.dtype
        rows = y.to(wide).reshape(-1, self.d_model)
        o = F.group_norm(rows, self.heads, self.ln_x.weight, self.ln_x.bias, self.ln_x.eps).view(gate.shape)
        return self.output((o * gate).to(self.output.kind))

    def _check(self, x: Any, context: Any, mask: Any, state: Any, time: bool = True) -> None:
        """Of a sequence, or of a token without an axis of time."""
        dims = Dims("CrossWKV")
        dims.fix("D", self.d_model, "d_model")
        dims.fix("Dc", self.d_context, "d_context")
        dims.optional("x", x, "BTD" if time else "BD")
        length = "T" if self.mode == "aligned" else "Tc"
        dims.optional("context", context, ("B", length, "Dc") if time else ("B", "Dc"))
        if mask is not None:
            if context is None:
                raise ValueError("CrossWKV: context_mask is given without a context")
            dims.match("context_mask", mask, ("B", length), (torch.bool,))
        if state is not None:
            if not isinstance(state, tuple) or len(state) != 3:
                raise TypeError(f"CrossWKV: state is {type(state).__name__}, expected a CrossWKVState, or None")
            dims.match("state.context", state[0], ("B", "Dc"))
            dims.match("state.x", state[1], "BD")
            for letter, size in (("H", self.heads), ("N", self.head_size)):
                dims.fix(letter, size, "d_model and head_size")
            dims.match("state.wkv", state[2], "BHNN")

    def extra_repr(self) -> str:
        text = f"d_model={self.d_model}, d_context={self.d_context}, head_size={self.head_size}, mode={self.mode!r}"
        return text if self.iclr_scale == 1 else f"{text}, iclr_scale={self.iclr_scale}"
