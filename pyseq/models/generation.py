"""Text generation: the prompt in one pass, then one step per token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pyseq.models import state as states
from pyseq.models.checks import check_ids, check_mask
from pyseq.models.decoding import Decoding, Sampling
from pyseq.models.replay import Replay, graphs_for

if TYPE_CHECKING:
    from pyseq.models.causal_lm import CausalLM

_CHUNK = 4096  # tokens of a prompt in one pass
_LOOK_EVERY = 16  # tokens between looks at a GPU, which would wait for each


def generate(
    model: CausalLM,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    *,
    attention_mask: torch.Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | str | None = None,
    stop: str | Sequence[Any] | None = None,
    seed: int | None = None,
    stream: Callable[[torch.Tensor], Any] | None = None,
    state: Any = None,
    return_state: bool = False,
) -> Any:
    """input_ids [B, T] -> [B, T + n], the prompt and n <= max_new_tokens new tokens.

    A row ends after an `eos_token_id` (one, several, "config" for the checkpoint's, None for none) or when its new
    tokens end with one of `stop`: a string (it needs `model.tokenizer`), or a sequence of token ids. It is then
    filled with the padding token (the config's, else its first end token, else 0) until the last row ends.

    attention_mask: [B, T], 0 on the left of shorter prompts.
    temperature, top_k, top_p: see `pyseq.models.sampling`; temperature 0 is greedy. repetition_penalty applies to the
    tokens of the prompt and the new ones. `seed` makes the draw repeatable; it leaves torch's global generator alone.
    stream: called with the ids [B] of each new token as soon as it is drawn.
    state: continue after this state; input_ids are then the tokens that follow it. It is not changed.
    return_state: return (ids, state) instead; the state has taken in every token of a row but its last, so that
    generate(ids[:, -1:], n, state=state) goes on where this call stopped.

    On CUDA the step, with the choice of its token, is captured into a graph and replayed, if there are at least 19
    tokens to make. The host looks at the device
    at every token if `stop` or `stream` is given, else at every 16th: up to 15 tokens may be computed in vain after the
    last row ended at `eos_token_id`, and are dropped.
    """
    _check_options(max_new_tokens, temperature, top_k, top_p, repetition_penalty)
    check_ids(input_ids, model.config.padded_vocab_size)
    if input_ids.shape[1] == 0:
        raise ValueError("input_ids must hold at least one token per row, got T = 0")
    if attention_mask is not None:
        check_mask(attention_mask, input_ids)
        if not bool(attention_mask[:, -1].bool().all()):
            raise ValueError("attention_mask must leave at least one token in every row, the last")
    ends = _end_tokens(model, eos_token_id)
    stops = _Stops(model, stop, len(input_ids))
    if max_new_tokens == 0:
        before = None if attention_mask is None else attention_mask[:, :-1]
        with torch.no_grad():
            state = _prefill(model, input_ids[:, :-1], state, before).state if return_state else None
        return (input_ids.long(), state) if return_state else input_ids.long()
    options = Sampling(temperature, top_k, top_p, repetition_penalty)
    graphs = graphs_for(input_ids.device)
    every = 1 if graphs is None or stops.asked or stream is not None else _LOOK_EVERY
    with torch.inference_mode():
        output = _prefill(model, input_ids, state, attention_mask)
        run = Decoding(
            model, output.state, input_ids, attention_mask, max_new_tokens, ends, options, seed,
            keep_ended=return_state and bool(ends or stops.asked),
        )  # fmt: skip
        run.prepare()
        run.take(output.logits[:, 0])
        advance = Replay(run.advance, graphs, max_new_tokens - 1)
        while True:
            token = run.record()
            if stops.asked:
                run.done.logical_or_(stops.matches(run.new, ~run.done))
            look = run.full or (run.end - run.start) % every == 0
            done = look and run.all_done()
            if stream is not None:
                stream(token.clone())
            if run.full or done:
                break
            run.prepare()
            advance()
        if done and every > 1:
            run.drop_padding()
    ids = run.ids[:, : run.end].clone()  # outside inference mode, so that autograd may use what is returned
    return (ids, states.clone(run.result_state())) if return_state else ids


def _prefill(model: CausalLM, ids: torch.Tensor, state: Any, mask: torch.Tensor | None) -> Any:
    """The prompt, in chunks that bound the memory; the logits of the last token."""
    for begin in range(0, max(ids.shape[1], 1), _CHUNK):
        piece = slice(begin, begin + _CHUNK)
        kept = None if mask is None else mask[:, piece]
        output = model(ids[:, piece], state, attention_mask=kept, logits_to_keep=1)
        state = output.state
    return output


class _Stops:
    """Whether the new tokens of a row end with a stop sequence, or their text contains a stop string."""

    def __init__(self, model: CausalLM, stop: str | Sequence[Any] | None, batch: int) -> None:
        items = [] if stop is None else [stop] if isinstance(stop, str) else list(stop)
        if items and all(isinstance(item, int) for item in items):
            items = [items]
        self.sequences = [[int(t) for t in item] for item in items if not isinstance(item, str)]
        self.texts = [item for item in items if isinstance(item, str)]
        if not all(self.sequences) or not all(self.texts):
            raise ValueError(f"stop must not contain an empty sequence, got {stop!r}")
        if self.texts and model.tokenizer is None:
            raise ValueError("stop: strings need a tokenizer; set model.tokenizer, or give sequences of token ids")
        tokenizer = model.tokenizer if self.texts else None
        self.decoders = [] if tokenizer is None else [tokenizer.decoder() for _ in range(batch)]
        self.tails = [""] * batch
        self.longest_text = max(map(len, self.texts), default=0)
        self.longest_sequence = max(map(len, self.sequences), default=0)
        self.asked = bool(items)

    def matches(self, new: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """new [B, n], the new tokens so far; `rows` [B], those to look at. To be called once per token."""
        found = [False] * len(rows)
        tails = new[:, -max(self.longest_sequence, 1) :].tolist()
        for row, wanted in enumerate(rows.tolist()):
            if wanted:
                tail = tails[row]
                found[row] = any(tail[-len(s) :] == s for s in self.sequences) or self._text(row, tail[-1])
        return torch.tensor(found, device=rows.device)

    def _text(self, row: int, token: int) -> bool:
        if not self.texts:
            return False
        text = self.tails[row] + self.decoders[row].push(token)
        self.tails[row] = text[-self.longest_text :]
        return any(stop in text for stop in self.texts)


def _end_tokens(model: CausalLM, eos: int | Sequence[int] | str | None) -> list[int]:
    if isinstance(eos, str):
        if eos != "config":
            raise ValueError(f'eos_token_id must be a token id, several, "config" or None, got {eos!r}')
        eos = model.config.eos_token_id
        if eos is None:
            raise ValueError('eos_token_id="config": the config of this model names no end token')
    tokens = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < model.config.padded_vocab_size:
            raise ValueError(f"eos_token_id must lie in [0, {model.config.padded_vocab_size}), got {token!r}")
    return tokens


def _check_options(max_new_tokens: Any, temperature: Any, top_k: Any, top_p: Any, repetition_penalty: Any) -> None:
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be a non-negative integer, got {max_new_tokens!r}")
    if not _number(temperature) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a non-negative number, got {temperature!r}")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be None or a positive integer, got {top_k!r}")
    if top_p is not None and (not _number(top_p) or not 0 < top_p <= 1):
        raise ValueError(f"top_p must be None or lie in (0, 1], got {top_p!r}")
    if not _number(repetition_penalty) or not 0 < repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty must be a positive number, got {repetition_penalty!r}")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
