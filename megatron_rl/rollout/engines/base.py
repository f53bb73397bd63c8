"""The protocol of inference engines, their requests, and the assignment of ranks to engines."""

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
    """A request for one or more samples of one prompt."""

    key: int
    """Identifies the request in its results."""
    token_ids: Tensor
    """[P] int64, the prompt."""
    seeds: tuple[int, ...]
    """One for each sample; a sample depends on its seed, not on the other requests."""
    max_new_tokens: int | None = None
    """Limit of this request, at most that of the sampling parameters; None: the limit of the sampling parameters."""

    def limit(self, params: SamplingParams) -> int:
        """Maximum number of new tokens of a sample."""
        return params.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The result of one sample of a request."""

    key: int
    """Key of the request."""
    sample: int
    """Index of the sample's seed in the request."""
    completion: Completion


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """A token sequence whose log-likelihood is computed from token ``start`` on, given the tokens before it."""

    token_ids: Tensor
    """[T] int64, the context followed by the continuation."""
    start: int
    """Index of the first token of the continuation, at least 1."""


@dataclass(frozen=True, kw_only=True)
class EnginePlace:
    """The position of a rank among the engines of the world; consecutive ranks share an engine."""

    index: int
    """Index of the engine."""
    count: int
    """Number of engines."""
    tp_rank: int
    tp_size: int
    leader: int
    """World rank of the engine's first rank."""
    group: Any
    """gloo group of the engine's ranks; None if the engine has a single rank."""

    @property
    def rank(self) -> int:
        """World rank."""
        return self.leader + self.tp_rank

    @property
    def is_leader(self) -> bool:
        """Whether this rank receives the requests and returns the results."""
        return self.tp_rank == 0

    def from_leader(self, value: Any) -> Any:
        """Return the leader's value on every rank of the engine; collective over the engine's ranks."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=self.leader, group=self.group)
        return box[0]


def engine_place(parallel: ParallelContext, tp_size: int) -> EnginePlace:
    """Return the position of this rank; collective over the world.

    Args:
        tp_size: ranks of each engine.
    """
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


def never_interrupted() -> bool:
    """Return False: no stop is ever requested."""
    return False


@dataclass(frozen=True, kw_only=True)
class EngineSetup:
    """The arguments that every engine is built from."""

    folder: str
    """Folder with the model's config.json; weights are not read from it."""
    spec: ModelSpec
    place: EnginePlace
    device: torch.device
    dtype: torch.dtype
    max_num_sequences: int
    """Maximum number of sequences that are decoded at a time."""
    max_model_len: int
    """Maximum number of tokens of a prompt with its response."""
    local_rank: int
    timeout_s: float = 600.0
    """Seconds without any answer after which an engine in other processes counts as dead."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the constructor of vLLM's or SGLang's engine."""
    is_interrupted: Callable[[], bool] = never_interrupted
    """Whether a stop of the run was requested; called by the engine's leader while the engine works."""


EnginePart = Literal["weights", "kv_cache"]


class Engine(Protocol):
    """An inference engine that samples from the policy."""

    @property
    def version(self) -> int:
        """Policy version of the weights in the engine; -1 before the first push."""
        ...

    @property
    def place(self) -> EnginePlace:
        """Index of this engine and position of this rank in it."""
        ...

    @property
    def starts_together(self) -> bool:
        """Whether all engines must be restarted together, because their start contains collectives over all ranks."""
        ...

    @property
    def death(self) -> str:
        """Why the engine died, as far as this rank knows; empty while it is alive."""
        ...

    def load_weights(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Load weights; collective over the engine's ranks.

        Args:
            tensors: (Hugging Face name, full-shape tensor); only the parts that this rank reads according to
                ``engine_boxes`` are filled. The tensors of a layer are consecutive.
            version: policy version of the weights.

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
        """Yield samples on the leader in the order in which they finish; collective over the engine's ranks.

        Args:
            requests: read one by one by the leader as capacity becomes free, so that engines can share a queue; None
                means that there is no request now, but there may be one after the next sample.
            max_requests: requests that may be in progress at a time.
            should_stop: called by the leader repeatedly; once it returns True, the unfinished samples are returned
                with their tokens so far and the finish reason "abort", and the iterator ends.

        Raises:
            EngineError: a request is empty, too long or has a token outside the vocabulary.
            EngineDied: the engine has died and may be restarted.
            Interrupted: on every rank of the engine, if ``is_interrupted`` of the setup returns True.
        """
        ...

    def loglikelihood(self, continuations: Sequence[Continuation]) -> list[Tensor]:
        """Compute the log-probabilities of given tokens at temperature 1; collective over the engine's ranks.

        Args:
            continuations: the same on every rank of the engine.

        Returns:
            One [T - start] float32 tensor for each continuation on the leader; an empty list on the other ranks.

        Raises:
            EngineError: a continuation is too long, or has no token before it.
            EngineDied: the engine has died and may be restarted.
        """
        ...

    def sleep(self) -> None:
        """Release the memory of weights and caches; the engine has no version until weights are pushed again."""
        ...

    def wake(self, part: EnginePart) -> None:
        """Reallocate the memory of a part: "weights" before a push, "kv_cache" before generating.

        Does nothing if the part is awake.
        """
        ...

    def memory(self) -> Mapping[EnginePart, int]:
        """Bytes that this rank's part of the engine holds now; parts of unknown size are absent."""
        ...

    def restart(self) -> None:
        """Start again after EngineDied, without weights; collective over the engine's ranks."""
        ...

    def close(self) -> None:
        """End the engine's processes and release its memory."""
        ...


def check_request(request: Request, params: SamplingParams, setup: EngineSetup) -> None:
    """Reject an invalid request before the engine receives it.

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
    """Reject invalid continuations before the engine receives them; collective over the engine's ranks.

    Raises:
        EngineError: the engine has no weights, or a continuation is too long, has no token before it, or has tokens
            outside the vocabulary.
        Interrupted: on every rank of the engine, if ``is_interrupted`` of the setup returns True.
    """
    engine = setup.place
    if engine.from_leader(engine.is_leader and setup.is_interrupted()):
        raise Interrupted("a stop was requested while log-likelihoods were computed")
    if version < 0:
        raise EngineError("the engine has no weights. Push weights before computing log-likelihoods.")
    for index, continuation in enumerate(continuations):
        length = continuation.token_ids.numel()
        if not 0 < continuation.start < length:
            raise EngineError(
                f"continuation {index} starts at token {continuation.start} of {length}: expected 1 to {length - 1}."
            )
        if length >= setup.max_model_len:
            raise EngineError(
                f"continuation {index} has {length} tokens, expected fewer than the engine's {setup.max_model_len}."
            )
        _check_tokens(f"continuation {index}", continuation.token_ids, setup)


def _check_tokens(what: str, ids: Tensor, setup: EngineSetup) -> None:
    if int(ids.min()) < 0 or int(ids.max()) >= setup.spec.vocab_size:
        raise EngineError(
            f"{what}: token ids {int(ids.min())} to {int(ids.max())}, expected 0 to {setup.spec.vocab_size - 1}. The "
            "tokenizer does not match the model."
        )
