"""The embedded engine: batched sampling with a KV cache in the trainer's own process, with torch only.

Rows join as others finish (continuous batching); the samples of a prompt share its prefill.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.rollout.engines.admission import Admission
from megatron_rl.rollout.engines.base import (
    Continuation,
    EnginePart,
    EngineSetup,
    Finished,
    Request,
    check_continuations,
)
from megatron_rl.rollout.engines.decoder import Decoder, KVCache
from megatron_rl.rollout.engines.sampling import choose, uniforms
from megatron_rl.rollout.engines.storages import Storages
from megatron_rl.types import Completion, FinishReason, SamplingParams

# Finished rows are dropped from the batch when they are at least this share of it.
DROP_SHARE = 0.125


@dataclass(kw_only=True)
class _Rows:
    """The samples in progress; row b of every tensor belongs to one sample."""

    cache: KVCache
    logits: Tensor
    """[B, V] float32, for the next token."""
    draws: Tensor
    """[B, max_new_tokens] float64 in [0, 1), one random draw for each token."""
    tokens: Tensor
    """[B, max_new_tokens] int64."""
    logprobs: Tensor
    """[B, max_new_tokens] float32."""
    counts: Tensor
    """[B] int64, number of tokens sampled so far."""
    limits: Tensor
    """[B] int64, maximum number of tokens."""
    working: Tensor
    """[B] bool; the other rows are finished and not dropped yet."""
    owners: list[tuple[int, int]]
    """(request key, sample) of each row."""
    routing: Tensor | None
    """[B, capacity, layers, experts per token] int16, of the tokens in the cache; None unless routing is reported."""

    def select(self, rows: Tensor) -> "_Rows":
        return _Rows(
            cache=self.cache.select(rows),
            logits=self.logits[rows],
            draws=self.draws[rows],
            tokens=self.tokens[rows],
            logprobs=self.logprobs[rows],
            counts=self.counts[rows],
            limits=self.limits[rows],
            working=self.working[rows],
            owners=[self.owners[row] for row in rows.tolist()],
            routing=None if self.routing is None else self.routing[rows],
        )

    def join(self, other: "_Rows") -> "_Rows":
        return _Rows(
            cache=self.cache.join(other.cache),
            logits=torch.cat([self.logits, other.logits]),
            draws=torch.cat([self.draws, other.draws]),
            tokens=torch.cat([self.tokens, other.tokens]),
            logprobs=torch.cat([self.logprobs, other.logprobs]),
            counts=torch.cat([self.counts, other.counts]),
            limits=torch.cat([self.limits, other.limits]),
            working=torch.cat([self.working, other.working]),
            owners=self.owners + other.owners,
            routing=_join_routing(self.routing, other.routing),
        )


class EmbeddedEngine:
    """An engine on one rank with the whole model."""

    starts_together = False

    def __init__(self, setup: EngineSetup, *, reports_routing: bool = False) -> None:
        """
        Args:
            reports_routing: return the experts of every token with each completion.
        """
        self.place = setup.place
        self._setup = setup
        self._decoder = Decoder(setup.spec, setup.device, setup.dtype)
        self._device = setup.device
        self._reports_routing = reports_routing
        self._weights = Storages(self._decoder.weights())
        self._version = -1

    @property
    def version(self) -> int:
        return self._version

    @property
    def death(self) -> str:
        return ""  # the engine has no process of its own

    def load_weights(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        self._version = -1  # half-loaded weights have no version
        self._decoder.load(tensors)
        self._version = version

    def sleep(self) -> None:
        self._version = -1
        self._weights.release()  # a KV cache exists only during ``generate``

    def wake(self, part: EnginePart) -> None:
        if part == "weights":
            self._weights.reallocate()

    def memory(self) -> Mapping[EnginePart, int]:
        return {"weights": self._weights.num_bytes, "kv_cache": 0}

    def restart(self) -> None:
        self._version = -1

    def close(self) -> None:
        pass

    def generate(
        self,
        requests: Iterator[Request | None],
        params: SamplingParams,
        *,
        max_requests: int,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[Finished]:
        stops = torch.tensor(params.stop_token_ids, dtype=torch.int64, device=self._device)
        admission = Admission(
            requests, params, self._setup, version=self._version, max_requests=max_requests, should_stop=should_stop
        )
        rows: _Rows | None = None
        while True:
            if admission.should_abort():
                if rows is not None:
                    yield from self._finish(rows, rows.working.nonzero()[:, 0], "abort")
                return
            fresh = admission.pull()
            if fresh:
                admitted = self._admit(fresh, params)
                rows = admitted if rows is None else rows.join(admitted)
            if rows is None:
                return
            for finished in self._step(rows, stops, params):
                admission.finish(finished.key)
                yield finished
            rows = self._drop_finished(rows)
            if rows is not None:
                self._advance(rows)

    def loglikelihood(self, continuations: Sequence[Continuation]) -> list[Tensor]:
        check_continuations(continuations, self._setup, version=self._version)
        return [
            self._decoder.loglikelihood(continuation.token_ids.to(self._device), continuation.start).cpu()
            for continuation in continuations
        ]

    def _admit(self, requests: list[Request], params: SamplingParams) -> _Rows:
        """Prefill every prompt once and give each of its samples a row."""
        lengths = torch.tensor([request.token_ids.numel() for request in requests], device=self._device)
        width = int(lengths.max())
        prompts = torch.stack([F.pad(r.token_ids, (0, width - r.token_ids.numel())) for r in requests]).to(self._device)
        cache = self._decoder.new_cache(len(requests), width + params.max_new_tokens)
        logits = self._decoder.prefill(prompts, lengths, cache)
        routing = self._routing_of_prompts(width + params.max_new_tokens) if self._reports_routing else None
        seeds = [seed for request in requests for seed in request.seeds]
        repeats = torch.tensor([len(request.seeds) for request in requests], device=self._device)
        request_of_row = torch.arange(len(requests), device=self._device).repeat_interleave(repeats)
        limits = torch.tensor([request.limit(params) for request in requests], device=self._device)
        shape = (len(seeds), params.max_new_tokens)
        return _Rows(
            cache=cache.select(request_of_row),
            logits=logits[request_of_row],
            draws=torch.stack([uniforms(seed, params.max_new_tokens) for seed in seeds]).to(self._device),
            tokens=torch.zeros(shape, dtype=torch.int64, device=self._device),
            logprobs=torch.zeros(shape, dtype=torch.float32, device=self._device),
            counts=torch.zeros(len(seeds), dtype=torch.int64, device=self._device),
            limits=limits[request_of_row],
            working=torch.ones(len(seeds), dtype=torch.bool, device=self._device),
            owners=[(request.key, sample) for request in requests for sample in range(len(request.seeds))],
            routing=None if routing is None else routing[request_of_row],
        )

    def _advance(self, rows: _Rows) -> None:
        """Decode the last token of every row: update the logits and record the experts of that token."""
        positions = None if rows.routing is None else rows.cache.lengths.clone()
        rows.logits = self._decoder.decode(_last_tokens(rows), rows.cache, rows.working)
        if rows.routing is not None:
            rows.routing[torch.arange(len(rows.owners), device=self._device), positions] = self._routes()[:, 0]

    def _routes(self) -> Tensor:
        """Return [B, P, layers, experts per token] int16, the experts of the decoder's last pass."""
        return torch.stack(self._decoder.routes, dim=2).to(torch.int16)

    def _routing_of_prompts(self, capacity: int) -> Tensor:
        """Return [B, capacity, layers, experts per token] int16; positions without a token name the first experts."""
        return _widen_routing(self._routes(), capacity)

    def _step(self, rows: _Rows, stops: Tensor, params: SamplingParams) -> list[Finished]:
        """Sample the next token of every row; return the samples that finish with it."""
        # finished rows that are not dropped yet have no position left for another token and keep their last one
        positions = rows.counts.clamp(max=params.max_new_tokens - 1)[:, None]
        tokens, logprobs = choose(rows.logits, rows.draws.gather(1, positions)[:, 0], params)
        for kept, new in ((rows.tokens, tokens), (rows.logprobs, logprobs)):
            kept.scatter_(1, positions, torch.where(rows.working[:, None], new[:, None], kept.gather(1, positions)))
        rows.counts += rows.working
        stopped = torch.isin(tokens, stops)
        ended = rows.working & (stopped | (rows.counts == rows.limits))
        rows.working &= ~ended
        at_stop, at_limit = (ended & stopped).nonzero()[:, 0], (ended & ~stopped).nonzero()[:, 0]
        return self._finish(rows, at_stop, "stop") + self._finish(rows, at_limit, "length")

    def _finish(self, rows: _Rows, ended: Tensor, reason: FinishReason) -> list[Finished]:
        if ended.numel() == 0:
            return []
        tokens, logprobs = rows.tokens[ended].cpu(), rows.logprobs[ended].cpu()
        routes = self._routing_of_ended(rows, ended)
        finished = []
        for i, (row, count) in enumerate(zip(ended.tolist(), rows.counts[ended].tolist(), strict=True)):
            key, sample = rows.owners[row]
            completion = Completion(
                token_ids=tokens[i, :count],
                logprobs=logprobs[i, :count],
                finish_reason=reason,
                policy_version=self._version,
                routing=routes[i],
            )
            finished.append(Finished(key=key, sample=sample, completion=completion))
        return finished

    def _routing_of_ended(self, rows: _Rows, ended: Tensor) -> Sequence[Tensor | None]:
        """Return [P + R, layers, experts per token] int16 for each ended row, or None if routing is not reported."""
        if rows.routing is None:
            return [None] * ended.numel()
        lengths = (rows.cache.lengths[ended] + 1).tolist()  # the token just chosen is not in the cache
        return [whole[:length] for whole, length in zip(rows.routing[ended].cpu(), lengths, strict=True)]

    def _drop_finished(self, rows: _Rows) -> _Rows | None:
        num_working = int(rows.working.sum())
        if num_working == 0:
            return None
        if len(rows.owners) - num_working < DROP_SHARE * len(rows.owners):
            return rows
        return rows.select(rows.working.nonzero().flatten())


def _join_routing(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return None
    capacity = max(first.size(1), second.size(1))
    return torch.cat([_widen_routing(first, capacity), _widen_routing(second, capacity)])


def _widen_routing(routing: Tensor, capacity: int) -> Tensor:
    """Pad [B, T, layers, k] to [B, capacity, layers, k]; the new positions name the first k experts."""
    first = torch.arange(routing.size(3), dtype=routing.dtype, device=routing.device)
    more = first.expand(routing.size(0), capacity - routing.size(1), *routing.shape[2:])
    return torch.cat([routing, more], dim=1)


def _last_tokens(rows: _Rows) -> Tensor:
    return rows.tokens.gather(1, (rows.counts - 1)[:, None])[:, 0]
