"""HTTP client of an OpenAI-compatible server."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any, TypeVar

import httpx

from megatron_rl.errors import EngineError, RequestRejected

MAX_TRIES = 6
FIRST_WAIT_S = 1.0
KEY_VARIABLE = "OPENAI_API_KEY"
REJECTION_STATUSES = (400, 413, 422)
"""HTTP statuses with which servers reject one request (too long, not allowed) rather than all requests."""
Item = TypeVar("Item")
Result = TypeVar("Result")


class Endpoint:
    """Client of one model at a server; retries requests while the server is busy."""

    def __init__(self, url: str, model: str, *, max_concurrent: int, timeout_s: float) -> None:
        """
        Args:
            url: base URL, such as http://127.0.0.1:8000/v1.
            model: name of the model at the endpoint.
            max_concurrent: requests that are in progress at a time.
            timeout_s: of one request.
        """
        key = os.environ.get(KEY_VARIABLE)
        self.model = model
        self._max_concurrent = max_concurrent
        self._client = httpx.Client(
            base_url=url.rstrip("/") + "/",
            timeout=timeout_s,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=max_concurrent),
        )

    @property
    def url(self) -> str:
        """Base URL with a trailing slash."""
        return str(self._client.base_url)

    def map_concurrently(self, request: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Call ``request`` for each item, up to ``max_concurrent`` at a time; yield the results in completion order."""
        queue = iter(items)
        with ThreadPoolExecutor(max_workers=self._max_concurrent) as threads:
            in_flight: set[Future[Result]] = set()
            try:
                while True:
                    for item in islice(queue, self._max_concurrent - len(in_flight)):
                        in_flight.add(threads.submit(request, item))
                    if not in_flight:
                        return
                    done, in_flight = wait(in_flight, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            finally:
                for future in in_flight:
                    future.cancel()

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the JSON of the reply; retry with growing waits while the server is busy.

        Raises:
            RequestRejected: the server rejects this request.
            EngineError: the server rejects all requests, or never replies.
        """
        problem = ""
        for attempt in range(MAX_TRIES):
            if attempt:
                time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1))
            try:
                reply = self._client.post(path, json={"model": self.model, **body})
            except httpx.HTTPError as error:
                problem = repr(error)
                continue
            if reply.status_code == 200:
                content: dict[str, Any] = reply.json()
                return content
            problem = f"status {reply.status_code}: {reply.text[:300]}"
            if reply.status_code in REJECTION_STATUSES:
                raise RequestRejected(f"{self.url}{path} rejects a request: {problem}")
            if reply.status_code < 500 and reply.status_code != 429:
                break
        raise EngineError(
            f"{self.url}{path} gave no answer: {problem}. Check the server and the model's name there, {self.model}; "
            f"an API key is read from {KEY_VARIABLE}."
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
