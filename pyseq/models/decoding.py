"""The rows of one call of generate: one token for each of them, on memory that stays where it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from pyseq.models import sampling
from pyseq.models import state as states

if TYPE_CHECKING:
    from pyseq.models.causal_lm import CausalLM

_DRAWS = 64  # tokens whose random numbers are drawn at once: a constant, so that a longer run starts like a shorter one


@dataclass(frozen=True)
class Sampling:
    temperature: float
    top_k: int | None
    top_p: float | None
    repetition_penalty: float


class Decoding:
    """Tokens, which rows have ended, and the states of those that have.

    `take` and `advance` read nothing back to the host and write only to the tensors made here, so that a CUDA graph can
    replay them. What differs from token to token is brought in by `prepare`, before, and out by `record`, after.
    """

    def __init__(
        self,
        model: CausalLM,
        state: Any,
        prompt: torch.Tensor,
        mask: torch.Tensor | None,
        n: int,
        ends: list[int],
        options: Sampling,
        seed: int | None,
        *,
        keep_ended: bool,
    ) -> None:
        batch, self.start = prompt.shape
        device = prompt.device
        self.pad = next((t for t in [model.config.pad_token_id, *ends] if t is not None), 0)
        self.ids = torch.full((batch, self.start + n), self.pad, dtype=torch.int64, device=device)
        self.ids[:, : self.start] = prompt
        self.end = self.start
        self.options, self.vocab = options, model.config.vocab_size
        self.token = torch.zeros(batch, dtype=torch.int64, device=device)
        self.done = torch.zeros(batch, dtype=torch.bool, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.ends = torch.tensor(ends, device=device) if ends else None
        self.seen = None if options.repetition_penalty == 1 else seen(prompt, mask, self.vocab)
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)
        self.draws = torch.empty(0, device=device)
        self.uniform = torch.zeros(batch, 1, device=device)
        self.state = state
        self.final = states.clone(state) if keep_ended else None  # of the rows that ended, as they were then
        self.step = model.stepper(state)

    def take(self, logits: torch.Tensor) -> None:
        """Chooses the next token of every row from logits [B, padded vocab]."""
        logits = logits[:, : self.vocab]
        finite = logits.amax(-1, keepdim=True).isfinite()
        self.finite.logical_and_(finite.all())
        logits = logits.masked_fill(~finite, 0.0)  # the run will stop; until it does, indices must stay legal
        if self.seen is not None:
            logits = sampling.penalise(logits, self.seen, self.options.repetition_penalty)
        o = self.options
        token = sampling.sample(logits, self.uniform, temperature=o.temperature, top_k=o.top_k, top_p=o.top_p)
        self.token.copy_(torch.where(self.done, self.pad, token))
        if self.seen is not None:
            self.seen.scatter_(1, self.token.clamp_max(self.vocab - 1)[:, None], True)
        if self.final is not None:
            pytree.tree_map(self._keep, self.final, self.state)
        if self.ends is not None:
            self.done.logical_or_((self.token[:, None] == self.ends).any(-1))

    def _keep(self, final: torch.Tensor, now: torch.Tensor) -> None:
        final.copy_(torch.where(self.done.view(-1, *[1] * (now.dim() - 1)), final, now))

    def advance(self) -> None:
        self.take(self.step(self.token))

    def prepare(self) -> None:
        """The random numbers of the next token, drawn on the CPU: the same on every device."""
        if self.options.temperature == 0:
            return
        k = (self.end - self.start) % _DRAWS
        if k == 0:
            drawn = torch.rand(_DRAWS, len(self.token), 1, generator=self.generator)
            self.draws = drawn.to(self.uniform.device)
        self.uniform.copy_(self.draws[k])

    def record(self) -> torch.Tensor:
        """Writes the token chosen into `ids`."""
        self.ids[:, self.end] = self.token
        self.end += 1
        return self.token

    @property
    def new(self) -> torch.Tensor:
        return self.ids[:, self.start : self.end]

    @property
    def full(self) -> bool:
        return self.end == self.ids.shape[1]

    def all_done(self) -> bool:
        """Waits for the device. Raises if any logits so far were not finite."""
        finite, done = torch.stack([self.finite, self.done.all()]).tolist()
        if not finite:
            raise ValueError("logits are not finite: the weights or the state hold nan or inf")
        return bool(done)

    def drop_padding(self) -> None:
        """Takes back the tokens after the last row ended at one of `ends`, where nobody had looked."""
        if self.ends is not None:
            ended = (self.new[..., None] == self.ends).any(-1)
            self.end = self.start + int(ended.int().argmax(-1).max()) + 1

    def result_state(self) -> Any:
        return self.state if self.final is None else self.final


def seen(prompt: torch.Tensor, mask: torch.Tensor | None, vocab: int) -> torch.Tensor:
    """[B, vocab], true for the tokens of each row's prompt."""
    ids = prompt.long()
    wanted = ids < vocab if mask is None else mask.bool() & (ids < vocab)
    found = torch.zeros(len(ids), vocab + 1, dtype=torch.bool, device=ids.device)
    return found.scatter_(1, torch.where(wanted, ids, vocab), True)[:, :vocab].contiguous()
