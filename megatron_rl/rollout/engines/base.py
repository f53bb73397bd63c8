"""The protocol of a rollout engine, and which ranks make up which engine."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.errors import EngineError, Interrupted
from megatron_rl.models import ModelSpec
from megatron_rl.types import Completion, ParallelContext, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Request:
    """Some samples of one prompt."""

    key: int
    """Given back with every completion."""
    token_ids: Tensor
    """[P] int64."""
    seeds: tuple[int, ...]
    """One for each sample; a sample depends on its seed and not on what else runs."""
    max_new_tokens: int | None = None
    """Fewer than the sampling parameters allow; None: as many."""

    def limit(self, params: SamplingParams) -> int:
        """Tokens after which a sample ends."""
        return params.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens


@dataclass(frozen=True, kw_only=True)
class Finished:
    """One sample that is done."""

    key: int
    sample: int
    """Place among the seeds of its request."""
    completion: Completion


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """Tokens whose probabilities behind others are asked."""

    token_ids: Tensor
    """[T] int64, with those before them."""
    start: int
    """Place of the first one that is asked, at least 1."""


@dataclass(frozen=True, kw_only=True)
class EnginePlace:
    """A rank's place in the engines of the world; neighbours share an engine."""

    index: int
    """Of the engine."""
    count: int
    """Of engines."""
    tp_rank: int
    tp_size: int
    leader: int
    """World rank of the engine's first rank."""
    group: Any
    """gloo group of the engine's ranks; None when it has one."""

    @property
    def rank(self) -> int:
        """In the world."""
        return self.leader + self.tp_rank

    @property
    def is_leader(self) -> bool:
        """This rank takes the requests and gives the results."""
        return self.tp_rank == 0

    def from_leader(self, value: Any) -> Any:
        """The leader's value on every rank of the engine; collective over them."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=self.leader, group=self.group)
        return box[0]


def engine_place(parallel: ParallelContext, tp_size: int) -> EnginePlace:
    """This rank's place; collective."""
    group = None
    for first in range(0, parallel.world_size, tp_size) if tp_size > 1 else ():
        ranks = list(range(first, first + tp_size))
        made = dist.new_group(ranks, backend="gloo")
        group = made if parallel.rank in ranks else group
    index = parallel.rank // tp_size
    return EnginePlace(
        index=index,
        count=parallel.world_size // tp_size,
        tp_rank=parallel.rank % tp_size,
        tp_size=tp_size,
        leader=index * tp_size,
        group=group,
    )


def never() -> bool:
    """Nobody interrupts."""
    return False


@dataclass(frozen=True, kw_only=True)
class EngineSetup:
    """What every engine is built from."""

    folder: str
    """config.json of the model; weights are not read from it."""
    spec: ModelSpec
    place: EnginePlace
    device: torch.device
    dtype: torch.dtype
    max_num_sequences: int
    """Sequences decoded at a time."""
    max_model_len: int
    """Tokens of the longest prompt with its response."""
    local_rank: int
    timeout_s: float = 600.0
    """Longest time that an engine in other processes may take for an answer."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the engine's own constructor."""
    is_interrupted: Callable[[], bool] = never
    """Asked by an engine's leader while it generates."""


EnginePart = Literal["weights", "kv_cache"]


class Engine(Protocol):
    """Samples from the policy."""

    @property
    def version(self) -> int:
        """Policy version of the weights in the engine; -1 before the first push."""
        ...

    @property
    def place(self) -> EnginePlace:
        """Which engine this is, and this rank's place in it."""
        ...

    @property
    def starts_together(self) -> bool:
        """All engines have to be restarted when one is: they meet in collectives while they start."""
        ...

    @property
    def death(self) -> str:
        """How the engine ended, as far as this rank knows; empty while it lives."""
        ...

    def load_weights(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Take over Hugging Face tensors; every rank of the engine takes part.

        Args:
            tensors: of whole shape, filled where ``engine_boxes`` says that this rank reads; one layer's come together.

        Raises:
            WeightSyncError: a name is missing or unexpected, or a shape is wrong.
        """
        ...

    def generate(
        self,
        requests: Iterator[Request | None],
        params: SamplingParams,
        *,
        max_requests: int,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[Finished]:
        """Samples in the order in which they finish; every rank of the engine takes part, its leader gets them.

        Args:
            requests: pulled one by one by the leader, as places get free, so that engines can share a queue; None:
                there is no request now, but there may be after the next sample.
            max_requests: requests that may be in work at a time.
            should_stop: asked by the leader all the time; once it says yes, what is in work is returned as it is, with
                the finish reason "abort", and the iterator ends.

        Raises:
            EngineError: a request is empty, too long or has a token outside the vocabulary.
            EngineDied: the engine is gone and may be restarted.
            Interrupted: on every rank of the engine, as its setup was told.
        """
        ...

    def score(self, continuations: Sequence[Continuation]) -> list[Tensor]:
        """Log-probabilities of tokens at temperature 1; every rank of the engine takes part, with the same ones.

        Returns:
            [T - start] float32 of each, on the leader; empty on the other ranks.

        Raises:
            EngineError: one is too long, or has nothing before it.
            EngineDied: the engine is gone and may be restarted.
        """
        ...

    def sleep(self) -> None:
        """Give up the memory of weights and caches; the engine has no version until weights are pushed again."""
        ...

    def wake(self, part: EnginePart) -> None:
        """Take the memory of a part again: that of the weights before a push, that of the cache before generating.

        Nothing happens when it is awake.
        """
        ...

    def memory(self) -> Mapping[EnginePart, int]:
        """Bytes that this rank's part of the engine holds now, as far as it can tell."""
        ...

    def restart(self) -> None:
        """Start again after EngineDied, without weights; every rank of the engine takes part."""
        ...

    def close(self) -> None:
        """Give up processes and memory."""
        ...


def check_request(request: Request, params: SamplingParams, setup: EngineSetup) -> None:
    """Refuse what an engine cannot take, before it sees it.

    Raises:
        EngineError: the request is empty, too long or has a token outside the vocabulary.
    """
    ids, limit = request.token_ids, setup.max_model_len
    if ids.numel() == 0 or not request.seeds:
        raise EngineError(
            f"request {request.key}: {ids.numel()} tokens, {len(request.seeds)} samples: expected at least 1 each."
        )
    _check_tokens(f"request {request.key}", ids, setup)
    if ids.numel() + request.limit(params) > limit:
        raise EngineError(
            f"request {request.key}: {ids.numel()} prompt tokens + rollout.max_new_tokens={request.limit(params)} "
            f"are more than the engine's {limit} tokens. Lower rollout.max_new_tokens or data.max_prompt_tokens."
        )


def check_continuations(continuations: Sequence[Continuation], setup: EngineSetup, *, version: int) -> None:
    """Refuse what an engine cannot score, before it sees it.

    Raises:
        EngineError: the engine has no weights; one is too long, has nothing before it, or tokens
            outside the vocabulary.
        Interrupted: on every rank of the engine, as the setup was told.
    """
    engine = setup.place
    if engine.from_leader(engine.is_leader and setup.is_interrupted()):
        raise Interrupted("asked to stop while continuations are scored")
    if version < 0:
        raise EngineError("the engine has no weights: push them before it scores.")
    for place, one in enumerate(continuations):
        length = one.token_ids.numel()
        if not 0 < one.start < length:
            raise EngineError(
                f"continuation {place} starts at token {one.start} of {length}: expected 1 to {length - 1}."
            )
        if length >= setup.max_model_len:
            raise EngineError(
                f"continuation {place} has {length} tokens, expected fewer than the engine's {setup.max_model_len}."
            )
        _check_tokens(f"continuation {place}", one.token_ids, setup)


def _check_tokens(what: str, ids: Tensor, setup: EngineSetup) -> None:
    if int(ids.min()) < 0 or int(ids.max()) >= setup.spec.vocab_size:
        raise EngineError(
            f"{what}: token ids {int(ids.min())} to {int(ids.max())}, expected 0 to {setup.spec.vocab_size - 1}. The "
            "tokenizer and the model do not belong together."
        )
