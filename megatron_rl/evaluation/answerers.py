"""Who answers: an engine of this process, or an endpoint that speaks OpenAI's protocol."""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any, Protocol

import httpx

from megatron_rl.config.evaluation import EvalEngineSection, TaskConfig
from megatron_rl.errors import EngineError
from megatron_rl.evaluation.responder import Asked, Response, cut, respond
from megatron_rl.rollout.engine import Engine

Wanted = Sequence[tuple[Asked, Sequence[tuple[int, int]]]]
"""Questions with (sample, seed) of each sample that is missing."""
MAX_TRIES = 6
FIRST_WAIT_S = 1.0
KEY_VARIABLE = "OPENAI_API_KEY"
FINISHED = {"stop": "stop", "length": "length", "max_tokens": "length"}


class Answerer(Protocol):
    """One of several that share the questions."""

    index: int
    count: int
    gives: bool
    """This rank gets the answers; the other ranks of its engine only compute."""

    def respond(self, task: TaskConfig, wanted: Wanted) -> Iterator[Response]:
        """Responses in the order in which they are finished."""
        ...

    def close(self) -> None: ...


class EngineAnswerer:
    """An engine with the model's weights in it."""

    def __init__(
        self, engine: Engine, tokenizer: Any, *, ends: Sequence[int], max_model_len: int, max_requests: int
    ) -> None:
        """
        Args:
            ends: tokens at which the model ends an answer, besides the tokenizer's.
        """
        self._ends = ends
        self.index, self.count, self.gives = engine.place.index, engine.place.count, engine.place.is_leader
        self._engine, self._tokenizer = engine, tokenizer
        self._max_model_len, self._max_requests = max_model_len, max_requests

    def respond(self, task: TaskConfig, wanted: Wanted) -> Iterator[Response]:
        return respond(
            self._engine,
            task,
            wanted,
            stop_token_ids=self._stop_token_ids(task),
            max_model_len=self._max_model_len,
            max_requests=self._max_requests,
            decode=lambda ids: self._tokenizer.decode(ids, skip_special_tokens=True),
        )

    def close(self) -> None:
        self._engine.close()

    def _stop_token_ids(self, task: TaskConfig) -> tuple[int, ...]:
        """The model's own end tokens, and those of the task's stops that are special tokens, which no text shows."""
        special = {
            token.content: place for place, token in self._tokenizer.added_tokens_decoder.items() if token.special
        }
        named = {special[text] for text in task.sampling.stop if text in special}
        return tuple(sorted({self._tokenizer.eos_token_id, *self._ends, *named}))


class EndpointAnswerer:
    """A server elsewhere; its tokenizer and chat template apply."""

    gives = True

    def __init__(self, config: EvalEngineSection, model: str, *, index: int, count: int) -> None:
        """
        Args:
            model: its name at the endpoint.
        """
        self.index, self.count = index, count
        self._model, self._at_a_time = model, config.max_num_sequences
        key = os.environ.get(KEY_VARIABLE)
        assert config.url is not None
        self._client = httpx.Client(
            base_url=config.url.rstrip("/") + "/",
            timeout=config.timeout_s,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=self._at_a_time),
        )

    def respond(self, task: TaskConfig, wanted: Wanted) -> Iterator[Response]:
        asked = ((one, sample, seed) for one, samples in wanted for sample, seed in samples)
        with ThreadPoolExecutor(max_workers=self._at_a_time) as threads:
            open_: set[Future[Response]] = set()
            try:
                while True:
                    for one in islice(asked, self._at_a_time - len(open_)):
                        open_.add(threads.submit(self._ask, task, *one))
                    if not open_:
                        return
                    done, open_ = wait(open_, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            finally:
                for future in open_:
                    future.cancel()

    def close(self) -> None:
        self._client.close()

    def _ask(self, task: TaskConfig, asked: Asked, sample: int, seed: int) -> Response:
        sampling = task.sampling
        question = asked.question.text
        system = [] if task.system_prompt is None else [{"role": "system", "content": task.system_prompt}]
        body = {
            "model": self._model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": seed % 2**31,
            **({"stop": sampling.stop} if sampling.stop else {}),
            **({"messages": [*system, {"role": "user", "content": question}]} if task.chat else {"prompt": question}),
        }
        found = self._posted("chat/completions" if task.chat else "completions", body)
        try:
            choice = found["choices"][0]
            text = (choice["message"]["content"] if task.chat else choice["text"]) or ""
            reason = FINISHED.get(choice.get("finish_reason") or "stop", "stop")
            num_tokens = int((found.get("usage") or {}).get("completion_tokens") or 0)
        except (KeyError, IndexError, TypeError) as error:
            raise EngineError(
                f"{self._client.base_url}: the answer is of another form ({error!r}): {found!r}"[:500]
            ) from error
        text, is_cut = cut(text, sampling.stop)
        return Response(
            asked=asked,
            sample=sample,
            seed=seed,
            text=text,
            num_tokens=num_tokens,
            finish_reason="stop" if is_cut else reason,
        )

    def _posted(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer; asked again where the server is busy or does not answer.

        Raises:
            EngineError: it refuses, or never answers.
        """
        problem = ""
        for attempt in range(MAX_TRIES):
            if attempt:
                time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1))
            try:
                answer = self._client.post(path, json=body)
            except httpx.HTTPError as error:
                problem = repr(error)
                continue
            if answer.status_code == 200:
                found: dict[str, Any] = answer.json()
                return found
            problem = f"status {answer.status_code}: {answer.text[:300]}"
            if answer.status_code < 500 and answer.status_code != 429:
                break
        raise EngineError(
            f"engine.url={self._client.base_url}: {path} gave no answer: {problem}. Look at the server and at "
            f"model.path, the model's name there; a key is read from {KEY_VARIABLE}."
        )
