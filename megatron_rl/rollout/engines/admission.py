"""How many requests an engine has in work, the same on all of its ranks."""

from collections.abc import Callable, Iterator
from typing import Literal

from megatron_rl.errors import EngineError, Interrupted
from megatron_rl.rollout.engines.base import EngineSetup, Request, check_request
from megatron_rl.types import SamplingParams

# calls between two questions whether to stop, where the ranks of an engine must agree on the answer
POLL_EVERY = 8


class Admission:
    """Takes requests from a queue as places get free."""

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
        Raises:
            EngineError: the engine's version says that it has no weights.
        """
        if version < 0:
            raise EngineError("the engine has no weights yet: push them before generating.")
        self._requests = requests
        self._params = params
        self._setup = setup
        self._max_requests = max_requests
        self._should_stop = should_stop
        self._in_work: dict[int, int] = {}  # request key -> samples not finished
        self._last_size = 1  # samples of the request pulled last: the next is expected to be like it
        self._exhausted = False
        self._num_asked = 0

    @property
    def is_idle(self) -> bool:
        """Nothing is in work."""
        return not self._in_work

    def pull(self) -> list[Request]:
        """What begins now; the leader asks the queue, and every rank of the engine gets the same.

        Raises:
            EngineError: on every rank, when a request cannot be served.
        """
        fresh = []
        while not self._exhausted and self._has_place():
            request = self._next()
            if request is None:
                break
            if request == "end":
                self._exhausted = True
            else:
                self._last_size = len(request.seeds)
                self._in_work[request.key] = len(request.seeds)
                fresh.append(request)
        return fresh

    def is_over(self) -> bool:
        """What is in work is to be given up; the same on every rank of the engine.

        Raises:
            Interrupted: the whole run is to stop.
        """
        place = self._setup.place
        self._num_asked += 1
        if self._should_stop is None and place.group is not None and self._num_asked % POLL_EVERY:
            return False
        told = place.from_leader(self._say() if place.is_leader else None)
        if told == "interrupted":
            raise Interrupted("asked to stop while responses are generated")
        return bool(told)

    def _say(self) -> bool | Literal["interrupted"]:
        if self._setup.is_interrupted():
            return "interrupted"
        return self._should_stop is not None and self._should_stop()

    def finish(self, key: int) -> None:
        """A sample of the request is done."""
        self._in_work[key] -= 1
        if self._in_work[key] == 0:
            del self._in_work[key]

    def _has_place(self) -> bool:
        if len(self._in_work) >= self._max_requests:
            return False
        num_sequences = sum(self._in_work.values())
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
