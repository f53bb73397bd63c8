"""A server elsewhere that speaks OpenAI's protocol."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any, TypeVar

import httpx

from megatron_rl.errors import EngineError, RefusedError

MAX_TRIES = 6
FIRST_WAIT_S = 1.0
KEY_VARIABLE = "OPENAI_API_KEY"
REFUSALS = (400, 413, 422)
"""Statuses by which servers refuse one request (too long, not allowed) and not all of them."""
Asked = TypeVar("Asked")
Found = TypeVar("Found")


class Endpoint:
    """Asks, again where the server is busy."""

    def __init__(self, url: str, model: str, *, at_a_time: int, timeout_s: float) -> None:
        """
        Args:
            model: its name at the endpoint.
        """
        key = os.environ.get(KEY_VARIABLE)
        self.model = model
        self._at_a_time = at_a_time
        self._client = httpx.Client(
            base_url=url.rstrip("/") + "/",
            timeout=timeout_s,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=at_a_time),
        )

    @property
    def url(self) -> str:
        return str(self._client.base_url)

    def each(self, ask: Callable[[Asked], Found], requests: Iterable[Asked]) -> Iterator[Found]:
        """Several at a time, in the order in which they are done."""
        queue = iter(requests)
        with ThreadPoolExecutor(max_workers=self._at_a_time) as threads:
            open_: set[Future[Found]] = set()
            try:
                while True:
                    for one in islice(queue, self._at_a_time - len(open_)):
                        open_.add(threads.submit(ask, one))
                    if not open_:
                        return
                    done, open_ = wait(open_, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            finally:
                for future in open_:
                    future.cancel()

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request of the endpoint's model.

        Raises:
            RefusedError: the server refuses this request.
            EngineError: it refuses all, or never answers.
        """
        problem = ""
        for attempt in range(MAX_TRIES):
            if attempt:
                time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1))
            try:
                answer = self._client.post(path, json={"model": self.model, **body})
            except httpx.HTTPError as error:
                problem = repr(error)
                continue
            if answer.status_code == 200:
                found: dict[str, Any] = answer.json()
                return found
            problem = f"status {answer.status_code}: {answer.text[:300]}"
            if answer.status_code in REFUSALS:
                raise RefusedError(f"{self.url}{path} refuses a request: {problem}")
            if answer.status_code < 500 and answer.status_code != 429:
                break
        raise EngineError(
            f"{self.url}{path} gave no answer: {problem}. Look at the server and at the model's name there, "
            f"{self.model}; a key is read from {KEY_VARIABLE}."
        )

    def close(self) -> None:
        self._client.close()
