"""Responses of an engine to questions."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from megatron_rl.config.evaluation import LikelihoodSection, TaskConfig
from megatron_rl.data.templates import adds_special_tokens, in_chat, tokenize
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.evaluation.questions import LETTERS, Question
from megatron_rl.rollout.engines.base import Continuation, Engine, Request
from megatron_rl.types import SamplingParams

QUESTIONS_AT_A_TIME = 64
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class RenderedQuestion:
    """A question as the model sees it."""

    question: Question
    prompt: str
    """With chat template."""
    token_ids: Sequence[int]
    choices: Sequence[str] = ()
    """What may stand behind the prompt, where the most likely one is the answer."""
    continuations: Sequence[Continuation] = ()
    """The prompt with each of them; empty where the model is elsewhere."""

    @property
    def digest(self) -> str:
        """Of what is asked and what is right."""
        return hashlib.sha256("\0".join([self.prompt, *self.question.answers, *self.choices]).encode()).hexdigest()[:16]

    @property
    def num_tokens(self) -> int:
        """Of the prompt, with the longest choice where there are any."""
        return max([len(self.token_ids), *(one.token_ids.numel() for one in self.continuations)])


@dataclass(frozen=True, kw_only=True)
class Response:
    """What came back for one sample."""

    asked: RenderedQuestion
    sample: int
    seed: int
    text: str
    num_tokens: int
    finish_reason: str
    likelihoods: Sequence[float] = ()
    """Of each choice, as they were compared; empty for a sampled response."""
    failure: str = ""
    """Why there is none; empty for one that came."""


Wanted = Sequence[tuple[RenderedQuestion, Sequence[tuple[int, int]]]]
"""Questions with (sample, seed) of each sample that is missing."""


def render_questions(task: TaskConfig, questions: Sequence[Question], tokenizer: Any) -> list[RenderedQuestion]:
    """Questions with the tokenizer's chat template, where the task asks as a user, and as tokens.

    Raises:
        ConfigError: a system prompt without a chat template.
        DataError: a prompt has no tokens.
    """
    templated = task.chat and tokenizer.chat_template is not None
    if task.system_prompt is not None and not templated:
        raise ConfigError(
            f"task {task.name} has a system_prompt, which needs a chat template and chat=true. Set system_prompt=null."
        )
    prompts = [
        in_chat(question.text, tokenizer, system_prompt=task.system_prompt) if templated else question.text
        for question in questions
    ]
    special = adds_special_tokens("auto" if templated else "none", tokenizer)
    asked = [
        _render_question(task, question, prompt, ids, tokenizer, templated=templated, special=special)
        for question, prompt, ids in zip(
            questions, prompts, tokenize(prompts, tokenizer, special_tokens=special), strict=True
        )
    ]
    empty = next((one for one in asked if not one.token_ids), None)
    if empty is not None:
        raise DataError(f"question {empty.question.index} of task {task.name} has no tokens: {empty.prompt!r}.")
    return asked


def _render_question(
    task: TaskConfig,
    question: Question,
    prompt: str,
    ids: Sequence[int],
    tokenizer: Any,
    *,
    templated: bool,
    special: bool,
) -> RenderedQuestion:
    choices = choices_behind(task, question, templated=templated)
    continuations = _continuations(prompt, ids, choices, tokenizer, special=special)
    for choice, one in zip(choices, continuations, strict=True):
        if one.start >= one.token_ids.numel():
            raise DataError(
                f"question {question.index} of task {task.name}: the choice {choice!r} has no tokens of its own behind "
                "the prompt. Change likelihood.before or the choice."
            )
    return RenderedQuestion(
        question=question, prompt=prompt, token_ids=ids, choices=choices, continuations=continuations
    )


def respond(
    engine: Engine,
    task: TaskConfig,
    wanted: Wanted,
    *,
    stop_token_ids: tuple[int, ...],
    max_model_len: int,
    max_requests: int,
    decode: Any,
) -> Iterator[Response]:
    """Sample responses, in the order in which they are finished; every rank of the engine takes part.

    Args:
        wanted: questions of this engine with (sample, seed) of each.
        max_model_len: tokens of prompt and response that the engine has room for.
        decode: token ids -> text.
    """
    sampling = task.sampling
    params = SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,
        max_new_tokens=sampling.max_new_tokens,
        stop_token_ids=stop_token_ids,
        logprobs=False,
    )
    requests = (
        Request(
            key=key,
            token_ids=torch.tensor(asked.token_ids),
            seeds=tuple(seed for _, seed in samples),
            max_new_tokens=min(sampling.max_new_tokens, max_model_len - len(asked.token_ids)),
        )
        for key, (asked, samples) in enumerate(wanted)
    )
    for finished in engine.generate(iter(requests), params, max_requests=max_requests):
        asked, samples = wanted[finished.key]
        sample, seed = samples[finished.sample]
        text, is_cut = cut(decode(finished.completion.token_ids), sampling.stop)
        yield Response(
            asked=asked,
            sample=sample,
            seed=seed,
            text=text,
            num_tokens=finished.completion.token_ids.numel(),
            finish_reason="stop" if is_cut else finished.completion.finish_reason,
        )


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """A text up to the first of the texts before which it ends, and whether there was one."""
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


def choices_behind(task: TaskConfig, question: Question, *, templated: bool = False) -> list[str]:
    """What may stand behind the prompt, with what separates it; empty unless the task goes by likelihood.

    Args:
        templated: a chat template ends the prompt, and separates it.
    """
    if task.likelihood is None:
        return []
    before = "" if templated else task.likelihood.before
    return [before + choice for choice in _choices(task.likelihood, question)]


def _choices(section: LikelihoodSection, question: Question) -> Sequence[str]:
    return LETTERS[: len(question.choices)] if section.of == "letters" else question.choices


def chosen(
    task: TaskConfig, asked: RenderedQuestion, seed: int, likelihoods: Sequence[float], lengths: Sequence[int]
) -> Response:
    """The most likely choice as a response, which is its letter; of equals the first.

    Args:
        likelihoods: log-likelihood of each choice.
        lengths: its tokens.
    """
    assert task.likelihood is not None
    choices = _choices(task.likelihood, asked.question)
    divisors = [max(1, len(one)) if task.likelihood.normalize == "characters" else 1 for one in choices]
    scores = [one / divisor for one, divisor in zip(likelihoods, divisors, strict=True)]
    place = scores.index(max(scores))
    return Response(
        asked=asked,
        sample=0,
        seed=seed,
        text=LETTERS[place],
        num_tokens=lengths[place],
        finish_reason="stop",
        likelihoods=scores,
    )


def choose(engine: Engine, task: TaskConfig, wanted: Wanted) -> Iterator[Response]:
    """The most likely choice of every question; every rank of the engine takes part, its leader gets the responses."""
    wanted = engine.place.from_leader(wanted)
    for group in batched(wanted, QUESTIONS_AT_A_TIME):
        found = iter(engine.score([one for asked, _ in group for one in asked.continuations]))
        for asked, ((_, seed),) in group if engine.place.is_leader else ():
            logprobs = [next(found) for _ in asked.continuations]
            yield chosen(task, asked, seed, [float(one.sum()) for one in logprobs], [one.numel() for one in logprobs])


def _continuations(
    prompt: str, ids: Sequence[int], choices: Sequence[str], tokenizer: Any, *, special: bool
) -> list[Continuation]:
    """Prompt and choice are encoded together; white space at the prompt's end belongs to the choice.

    Args:
        ids: of the prompt.
    """
    if not choices:
        return []
    head = ids
    if prompt != prompt.rstrip():
        (head,) = tokenize([prompt.rstrip()], tokenizer, special_tokens=special)
    wholes = tokenize([prompt + choice for choice in choices], tokenizer, special_tokens=special)
    if not head:  # something has to stand before a first token
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        head, wholes = [first], [[first, *whole] for whole in wholes]
    return [Continuation(token_ids=torch.tensor(whole), start=len(head)) for whole in wholes]


def batched(values: Sequence[Value], size: int) -> Iterator[Sequence[Value]]:
    """So many at a time."""
    for start in range(0, len(values), size):
        yield values[start : start + size]
