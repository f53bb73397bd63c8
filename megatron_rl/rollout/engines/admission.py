"""Admission of requests to an engine, identical on all of its ranks."""

from collections.abc import Callable, Iterator
from typing import Literal

from megatron_rl.errors import EngineError, Interrupted
from megatron_rl.rollout.engines.base import EngineSetup, Request, check_request
from megatron_rl.types import SamplingParams

# calls of ``should_abort`` per check, where the check is a broadcast over the ranks of an engine
POLL_EVERY = 8


class Admission:
    """Takes requests from a queue as the engine's capacity allows."""

    def __init__(
        self,
        requests: Iterator[Request | None],
        params: SamplingParams,
        setup: EngineSetup,
        *,
        version: int,
        max_requests: int,
        should_stop: Callable[[], bool] | None,
    ) -> None:
        """
        Args:
            requests: as in ``Engine.generate``; only the leader reads it.
            version: policy version of the engine's weights; -1 if it has none.
            max_requests: requests that may be in progress at a time.
            should_stop: as in ``Engine.generate``; only the leader calls it.

        Raises:
            EngineError: the engine has no weights.
        """
        if version < 0:
            raise EngineError("the engine has no weights yet. Push weights before generating.")
        self._requests = requests
        self._params = params
        self._setup = setup
        self._max_requests = max_requests
        self._should_stop = should_stop
        self._num_unfinished: dict[int, int] = {}  # request key -> samples not finished
        self._last_size = 1  # samples of the last request; the next one is assumed to have as many
        self._exhausted = False
        self._num_calls = 0

    @property
    def is_idle(self) -> bool:
        """Whether no request is in progress."""
        return not self._num_unfinished

    def pull(self) -> list[Request]:
        """Return the requests to start now: the leader reads the queue, and every rank of the engine gets the same.

        Raises:
            EngineError: on every rank, if a request cannot be served.
        """
        started = []
        while not self._exhausted and self._has_capacity():
            request = self._next()
            if request is None:
                break
            if request == "end":
                self._exhausted = True
            else:
                self._last_size = len(request.seeds)
                self._num_unfinished[request.key] = len(request.seeds)
                started.append(request)
        return started

    def should_abort(self) -> bool:
        """Whether the requests in progress must be aborted; the same on every rank of the engine.

        Raises:
            Interrupted: a stop of the whole run was requested.
        """
        place = self._setup.place
        self._num_calls += 1
        if self._should_stop is None and place.group is not None and self._num_calls % POLL_EVERY:
            return False
        state = place.from_leader(self._stop_state() if place.is_leader else None)
        if state == "interrupted":
            raise Interrupted("a stop was requested while responses were generated")
        return bool(state)

    def _stop_state(self) -> bool | Literal["interrupted"]:
        if self._setup.is_interrupted():
            return "interrupted"
        return self._should_stop is not None and self._should_stop()

    def finish(self, key: int) -> None:
        """Record that a sample of the request is finished."""
        self._num_unfinished[key] -= 1
        if self._num_unfinished[key] == 0:
            del self._num_unfinished[key]

    def _has_capacity(self) -> bool:
        if len(self._num_unfinished) >= self._max_requests:
            return False
        num_sequences = sum(self._num_unfinished.values())
        return num_sequences == 0 or num_sequences + self._last_size <= self._setup.max_num_sequences

    def _next(self) -> Request | Literal["end"] | None:
        request: Request | Literal["end"] | None = None
        failure = None
        if self._setup.place.is_leader:
            try:
                request = next(self._requests, "end")
                if isinstance(request, Request):
                    check_request(request, self._params, self._setup)
            except EngineError as error:
                failure = str(error)
        request, failure = self._setup.place.from_leader((request, failure))
        if failure is not None:
            raise EngineError(failure)
        return request
