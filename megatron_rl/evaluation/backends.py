"""Backends that generate responses: an engine of this job, or an OpenAI-compatible endpoint."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from megatron_rl.config.evaluation import EvalEngineSection, TaskConfig
from megatron_rl.errors import EngineError, RequestRejected
from megatron_rl.evaluation.generation import (
    RenderedQuestion,
    Response,
    SampleRequests,
    choice_response,
    choice_texts,
    choose_by_likelihood,
    sample_responses,
    truncate_at_stop,
)
from megatron_rl.evaluation.openai_client import Endpoint
from megatron_rl.rollout.engines.base import Engine

MAX_REJECTIONS = 16
"""Rejected requests, without one that succeeded, after which the evaluation ends with an error."""
FINISH_REASONS = {"stop": "stop", "length": "length", "max_tokens": "length"}
"""finish_reason of a server -> ours."""


def suffix_logprobs(text: str, tokens: Sequence[str], logprobs: Sequence[float | None]) -> list[float]:
    """Return the log-probabilities of the last tokens of a prompt that together spell ``text``.

    The first of these tokens may begin before ``text``. Offsets that servers report are not used: they count start
    tokens and broken characters, or are missing. White space is not compared, because some tokenizers decode single
    tokens without it.

    Args:
        text: end of the prompt.
        tokens: tokens of the prompt as text, optionally followed by one generated token.
        logprobs: log-probability of each token; None where the server reports none.

    Raises:
        ValueError: the prompt's tokens do not end with ``text``.
    """
    target = _without_whitespace(text)
    for end in (len(tokens) - 1, len(tokens)):
        suffix, start = "", end
        while start > 0 and len(_without_whitespace(suffix)) < len(target):
            start -= 1
            suffix = tokens[start] + suffix
        if not target or not _without_whitespace(suffix).endswith(target):
            continue
        if start > 1 and text[0].isspace() and not suffix[0].isspace() and tokens[start - 1].isspace():
            start -= 1  # the white space is a token of its own
        reported = [logprob for logprob in logprobs[start:end] if logprob is not None]
        if len(reported) == end - start:
            return reported
    raise ValueError(f"the prompt's tokens do not end with {text!r}")


def _without_whitespace(text: str) -> str:
    return "".join(text.split())


class EvalBackend(Protocol):
    """One of ``count`` backends that share the questions of a benchmark."""

    index: int
    """Index of this backend."""
    count: int
    """Number of backends."""
    receives_responses: bool
    """Whether this rank receives the responses; the other ranks of its engine only compute."""

    def generate(
        self, task: TaskConfig, requests: SampleRequests, *, any_succeeded: bool = False
    ) -> Iterator[Response]:
        """Yield responses in completion order.

        Args:
            task: sampling parameters and stops.
            requests: questions with the samples to generate.
            any_succeeded: whether an earlier start got responses for the task, so that the backend is known to work.
        """
        ...

    def close(self) -> None:
        """Release the engine or the connections."""
        ...


class EngineBackend:
    """Generates with an inference engine that holds the model's weights."""

    def __init__(
        self, engine: Engine, tokenizer: Any, *, eos_token_ids: Sequence[int], max_model_len: int, max_requests: int
    ) -> None:
        """
        Args:
            engine: this rank's part of an engine.
            tokenizer: of the model.
            eos_token_ids: tokens that end a response, in addition to the tokenizer's.
            max_model_len: tokens of prompt and response that the engine supports.
            max_requests: requests that the engine holds at a time.
        """
        self._eos_token_ids = eos_token_ids
        self.index, self.count, self.receives_responses = engine.place.index, engine.place.count, engine.place.is_leader
        self._engine, self._tokenizer = engine, tokenizer
        self._max_model_len, self._max_requests = max_model_len, max_requests

    def generate(
        self, task: TaskConfig, requests: SampleRequests, *, any_succeeded: bool = False
    ) -> Iterator[Response]:
        """Yield responses in completion order; every rank of the engine takes part, its leader gets the responses."""
        if task.likelihood is not None:
            return choose_by_likelihood(self._engine, task, requests)
        return sample_responses(
            self._engine,
            task,
            requests,
            stop_token_ids=self._stop_token_ids(task),
            max_model_len=self._max_model_len,
            max_requests=self._max_requests,
            decode=lambda ids: self._tokenizer.decode(ids, skip_special_tokens=True),
        )

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()

    def _stop_token_ids(self, task: TaskConfig) -> tuple[int, ...]:
        """Return the end-of-sequence tokens and the task's stops that are special tokens, which decoded text lacks."""
        special = {
            token.content: token_id for token_id, token in self._tokenizer.added_tokens_decoder.items() if token.special
        }
        stops = {special[text] for text in task.sampling.stop if text in special}
        return tuple(sorted({self._tokenizer.eos_token_id, *self._eos_token_ids, *stops}))


class OpenAIBackend:
    """Generates with a remote OpenAI-compatible server, whose tokenizer and chat template apply."""

    receives_responses = True

    def __init__(self, config: EvalEngineSection, model: str, *, index: int, count: int) -> None:
        """
        Args:
            config: url and limits of the endpoint.
            model: name of the model at the endpoint.
            index: index of this rank's backend.
            count: number of backends.
        """
        assert config.url is not None
        self.index, self.count = index, count
        self._endpoint = Endpoint(
            config.url, model, max_concurrent=config.max_num_sequences, timeout_s=config.timeout_s
        )

    def generate(
        self, task: TaskConfig, requests: SampleRequests, *, any_succeeded: bool = False
    ) -> Iterator[Response]:
        """Yield responses in completion order; a rejected request yields one with ``failure`` set.

        Raises:
            EngineError: the server does not respond, or rejects all requests.
        """
        samples = ((rendered, sample, seed) for rendered, samples in requests for sample, seed in samples)
        rejections: list[str] = []
        for response in self._endpoint.map_concurrently(lambda one: self._request(task, *one), samples):
            any_succeeded = any_succeeded or not response.failure
            rejections += [response.failure] if response.failure else []
            if len(rejections) < MAX_REJECTIONS or any_succeeded:
                yield response
                continue
            break
        if rejections and not any_succeeded:
            raise EngineError(
                f"task {task.name}: {rejections[-1]}. The server rejected all of {len(rejections)} requests."
            )

    def close(self) -> None:
        """Close the connections."""
        self._endpoint.close()

    def _request(self, task: TaskConfig, rendered: RenderedQuestion, sample: int, seed: int) -> Response:
        try:
            if task.likelihood is not None:
                return self._choose(task, rendered, seed)
            return self._sample(task, rendered, sample, seed)
        except RequestRejected as error:
            return Response(
                rendered=rendered,
                sample=sample,
                seed=seed,
                text="",
                num_tokens=0,
                finish_reason="stop",
                failure=str(error),
            )

    def _choose(self, task: TaskConfig, rendered: RenderedQuestion, seed: int) -> Response:
        """Return the most likely choice; the server tokenizes prompt and choice together."""
        choices = choice_texts(task, rendered.question)
        logprobs = [self._choice_logprobs(rendered.question.text, choice) for choice in choices]
        return choice_response(task, rendered, seed, [sum(one) for one in logprobs], [len(one) for one in logprobs])

    def _choice_logprobs(self, prompt: str, choice: str) -> list[float]:
        """Return the log-probabilities of the tokens that spell the choice.

        Raises:
            EngineError: the server returns no log-probabilities of the prompt.
        """
        begin, whole = len(prompt.rstrip()), prompt + choice
        body = {"prompt": whole, "max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1}
        reply = self._endpoint.post("completions", body)
        try:
            details = reply["choices"][0]["logprobs"]
            logprobs = suffix_logprobs(whole[begin:], details["tokens"], details["token_logprobs"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EngineError(
                f"{self._endpoint.url}: the reply has no log-probabilities of the prompt ({error!r}), which tasks with "
                f"likelihood set need (echo and logprobs of completions): {reply!r}"[:500]
            ) from error
        return logprobs

    def _sample(self, task: TaskConfig, rendered: RenderedQuestion, sample: int, seed: int) -> Response:
        sampling, prompt = task.sampling, rendered.question.text
        body: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": seed % 2**31,
        }
        if sampling.stop:
            body["stop"] = sampling.stop
        if task.chat:
            body["messages"] = [] if task.system_prompt is None else [{"role": "system", "content": task.system_prompt}]
            body["messages"].append({"role": "user", "content": prompt})
        else:
            body["prompt"] = prompt
        reply = self._endpoint.post("chat/completions" if task.chat else "completions", body)
        try:
            choice = reply["choices"][0]
            text = (choice["message"]["content"] if task.chat else choice["text"]) or ""
            reason = FINISH_REASONS.get(choice.get("finish_reason") or "stop", "stop")
            num_tokens = int((reply.get("usage") or {}).get("completion_tokens") or 0)
        except (KeyError, IndexError, TypeError) as error:
            raise EngineError(
                f"{self._endpoint.url}: the reply is no OpenAI completion ({error!r}): {reply!r}"[:500]
            ) from error
        text, is_stopped = truncate_at_stop(text, sampling.stop)
        return Response(
            rendered=rendered,
            sample=sample,
            seed=seed,
            text=text,
            num_tokens=num_tokens,
            finish_reason="stop" if is_stopped else reason,
        )
