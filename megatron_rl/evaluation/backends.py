"""Who answers: an engine of this process, or an endpoint that speaks OpenAI's protocol."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from megatron_rl.config.evaluation import EvalEngineSection, TaskConfig
from megatron_rl.errors import EngineError, RefusedError
from megatron_rl.evaluation.generation import (
    RenderedQuestion,
    Response,
    Wanted,
    choices_behind,
    choose,
    chosen,
    cut,
    respond,
)
from megatron_rl.evaluation.openai_client import Endpoint
from megatron_rl.rollout.engines.base import Engine

MANY_REFUSALS = 16
"""So many refused requests without one that is answered mean that the server takes none."""
FINISHED = {"stop": "stop", "length": "length", "max_tokens": "length"}


def behind(text: str, tokens: Sequence[str], logprobs: Sequence[float | None]) -> list[float]:
    """Log-probabilities of the last tokens of a prompt, those that spell a text; the first may begin before it.

    Offsets that servers report are not used: they count start tokens and broken characters, or are missing. White space
    is not compared, as some tokenizers decode single tokens without it.

    Args:
        tokens: of the prompt, and perhaps one that was generated behind it.

    Raises:
        ValueError: the tokens end otherwise.
    """
    wanted = _visible(text)
    for end in (len(tokens) - 1, len(tokens)):
        spelt, start = "", end
        while start > 0 and len(_visible(spelt)) < len(wanted):
            start -= 1
            spelt = tokens[start] + spelt
        if not wanted or not _visible(spelt).endswith(wanted):
            continue
        if start > 1 and text[0].isspace() and not spelt[0].isspace() and tokens[start - 1].isspace():
            start -= 1  # the white space is a token of its own
        found = [one for one in logprobs[start:end] if one is not None]
        if len(found) == end - start:
            return found
    raise ValueError(f"the prompt's tokens do not end with {text!r}")


def _visible(text: str) -> str:
    return "".join(text.split())


class EvalBackend(Protocol):
    """One of several that share the questions."""

    index: int
    count: int
    gives: bool
    """This rank gets the answers; the other ranks of its engine only compute."""

    def respond(self, task: TaskConfig, wanted: Wanted, *, some_answered: bool = False) -> Iterator[Response]:
        """Responses in the order in which they are finished.

        Args:
            some_answered: there are answers to the task already.
        """
        ...

    def close(self) -> None: ...


class EngineBackend:
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

    def respond(self, task: TaskConfig, wanted: Wanted, *, some_answered: bool = False) -> Iterator[Response]:
        if task.likelihood is not None:
            return choose(self._engine, task, wanted)
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


class OpenAIBackend:
    """A server elsewhere; its tokenizer and chat template apply."""

    gives = True

    def __init__(self, config: EvalEngineSection, model: str, *, index: int, count: int) -> None:
        """
        Args:
            model: its name at the endpoint.
        """
        assert config.url is not None
        self.index, self.count = index, count
        self._endpoint = Endpoint(config.url, model, at_a_time=config.max_num_sequences, timeout_s=config.timeout_s)

    def respond(self, task: TaskConfig, wanted: Wanted, *, some_answered: bool = False) -> Iterator[Response]:
        """
        Raises:
            EngineError: the server does not answer, or refuses everything.
        """
        asked = ((one, sample, seed) for one, samples in wanted for sample, seed in samples)
        refused: list[str] = []
        for response in self._endpoint.each(lambda one: self._ask(task, *one), asked):
            some_answered = some_answered or not response.failure
            refused += [response.failure] if response.failure else []
            if len(refused) < MANY_REFUSALS or some_answered:
                yield response
                continue
            break
        if refused and not some_answered:
            raise EngineError(f"task {task.name}: {refused[-1]}. It refused all of {len(refused)} requests.")

    def close(self) -> None:
        self._endpoint.close()

    def _ask(self, task: TaskConfig, asked: RenderedQuestion, sample: int, seed: int) -> Response:
        try:
            if task.likelihood is not None:
                return self._choose(task, asked, seed)
            return self._sample(task, asked, sample, seed)
        except RefusedError as error:
            return Response(
                asked=asked, sample=sample, seed=seed, text="", num_tokens=0, finish_reason="stop", failure=str(error)
            )

    def _choose(self, task: TaskConfig, asked: RenderedQuestion, seed: int) -> Response:
        """The server says what it thinks of prompt and choice together; how it splits them into tokens is its own."""
        found = [self._likelihood(asked.question.text, choice) for choice in choices_behind(task, asked.question)]
        return chosen(task, asked, seed, [sum(one) for one in found], [len(one) for one in found])

    def _likelihood(self, prompt: str, choice: str) -> list[float]:
        """Log-probabilities of the tokens that begin in the choice.

        Raises:
            EngineError: the server does not say.
        """
        begin, whole = len(prompt.rstrip()), prompt + choice
        body = {"prompt": whole, "max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1}
        found = self._endpoint.post("completions", body)
        try:
            about = found["choices"][0]["logprobs"]
            logprobs = behind(whole[begin:], about["tokens"], about["token_logprobs"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EngineError(
                f"{self._endpoint.url}: no log-probabilities of the prompt ({error!r}), which tasks by likelihood "
                f"need (echo and logprobs of completions): {found!r}"[:500]
            ) from error
        return logprobs

    def _sample(self, task: TaskConfig, asked: RenderedQuestion, sample: int, seed: int) -> Response:
        sampling, text = task.sampling, asked.question.text
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
            body["messages"].append({"role": "user", "content": text})
        else:
            body["prompt"] = text
        found = self._endpoint.post("chat/completions" if task.chat else "completions", body)
        try:
            choice = found["choices"][0]
            said = (choice["message"]["content"] if task.chat else choice["text"]) or ""
            reason = FINISHED.get(choice.get("finish_reason") or "stop", "stop")
            num_tokens = int((found.get("usage") or {}).get("completion_tokens") or 0)
        except (KeyError, IndexError, TypeError) as error:
            raise EngineError(
                f"{self._endpoint.url}: the answer is of another form ({error!r}): {found!r}"[:500]
            ) from error
        said, is_cut = cut(said, sampling.stop)
        return Response(
            asked=asked,
            sample=sample,
            seed=seed,
            text=said,
            num_tokens=num_tokens,
            finish_reason="stop" if is_cut else reason,
        )
