"""Text generation: the prompt in one pass, then one step per token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pyseq.models import sampling
from pyseq.models import state as states
from pyseq.models.checks import check_ids, check_mask

if TYPE_CHECKING:
    from pyseq.models.causal_lm import CausalLM


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
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    def choose(logits: torch.Tensor) -> torch.Tensor:
        return sampling.sample(logits, generator, temperature=temperature, top_k=top_k, top_p=top_p)

    seen = None if repetition_penalty == 1 else _seen(model, input_ids, attention_mask)
    if max_new_tokens == 0:
        before = None if attention_mask is None else attention_mask[:, :-1]
        with torch.no_grad():
            state = model(input_ids[:, :-1], state, attention_mask=before).state if return_state else None
        return (input_ids.long(), state) if return_state else input_ids.long()
    with torch.inference_mode():
        output = model(input_ids, state, attention_mask=attention_mask, logits_to_keep=1)
        run = _Run(model, output.state, input_ids, max_new_tokens, ends, stops, return_state)
        logits, step = output.logits[:, 0], model.stepper(output.state)
        while run.open:
            logits = logits[:, : model.config.vocab_size]
            if seen is not None:
                logits = sampling.penalise(logits, seen[:, : model.config.vocab_size], repetition_penalty)
            if not bool(logits.amax(-1).isfinite().all()):
                raise ValueError("logits are not finite: the weights or the state hold nan or inf")
            token = run.append(choose(logits))
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            if stream is not None:
                stream(token.clone())
            if run.open:
                logits = step(token)
    ids = run.ids[:, : run.end].clone()  # outside inference mode, so that autograd may use what is returned
    return (ids, states.clone(run.result_state())) if return_state else ids


class _Run:
    """The rows of one call: their tokens, which have ended, and the states of those that have."""

    def __init__(
        self, model: CausalLM, state: Any, prompt: torch.Tensor, n: int, ends: list[int], stops: _Stops, keep: bool
    ) -> None:
        batch, self.start = prompt.shape
        pad = next((t for t in [model.config.pad_token_id, *ends] if t is not None), 0)
        self.ids = torch.full((batch, self.start + n), pad, dtype=torch.int64, device=prompt.device)
        self.ids[:, : self.start] = prompt
        self.end = self.start
        self.pad, self.stops, self.keep, self.state = pad, stops, keep, state
        self.ends = torch.tensor(ends, device=prompt.device) if ends else None
        self.done = torch.zeros(batch, dtype=torch.bool, device=prompt.device)
        self.final: Any = None  # the states of the rows that ended, as they were then

    @property
    def open(self) -> bool:
        return self.end < self.ids.shape[1] and not bool(self.done.all())

    def append(self, token: torch.Tensor) -> torch.Tensor:
        token = torch.where(self.done, self.pad, token)
        self.ids[:, self.end] = token
        self.end += 1
        ended = self.stops.matches(self.ids[:, self.start : self.end], ~self.done)
        if self.ends is not None:
            ended |= torch.isin(token, self.ends)
        ended &= ~self.done
        if self.keep and bool(ended.any()):
            if self.final is None:
                self.final = states.clone(self.state)
            states.copy_(self.final, self.state, ended)
        self.done = self.done | ended
        return token

    def result_state(self) -> Any:
        return self.state if self.final is None else states.copy_(states.clone(self.state), self.final, self.done)


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

    def matches(self, new: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """new [B, n], the new tokens so far; `rows` [B], those to look at. To be called once per token."""
        found = torch.zeros_like(rows)
        if self.sequences or self.texts:
            for row in rows.nonzero()[:, 0].tolist():
                tokens = new[row, -self.longest_sequence :].tolist() if self.sequences else []
                found[row] = any(tokens[-len(s) :] == s for s in self.sequences) or self._text(row, int(new[row, -1]))
        return found

    def _text(self, row: int, token: int) -> bool:
        if not self.texts:
            return False
        text = self.tails[row] + self.decoders[row].push(token)
        self.tails[row] = text[-self.longest_text :]
        return any(stop in text for stop in self.texts)


def _seen(model: CausalLM, prompt: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[B, padded vocab], true for the tokens of each row's prompt."""
    seen = torch.zeros(len(prompt), model.config.padded_vocab_size, dtype=torch.bool, device=prompt.device)
    for row, ids in enumerate(prompt):
        seen[row, (ids if mask is None else ids[mask[row].bool()]).long()] = True
    return seen


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
