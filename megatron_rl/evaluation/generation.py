"""Rendering questions as prompts, and generating responses to them with an engine."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from megatron_rl.config.evaluation import LikelihoodSection, TaskConfig
from megatron_rl.data.templates import adds_special_tokens, apply_chat_template, tokenize
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.evaluation.questions import LETTERS, Question
from megatron_rl.rollout.engines.base import Continuation, Engine, Request
from megatron_rl.types import SamplingParams

QUESTIONS_PER_BATCH = 64
"""Questions whose choices an engine scores in one call."""
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class RenderedQuestion:
    """A question as the prompt of the evaluated model."""

    question: Question
    prompt: str
    """Text with the chat template, if the task uses one."""
    token_ids: Sequence[int]
    choices: Sequence[str] = ()
    """Texts after the prompt, of which the most likely one is the response; empty if responses are sampled."""
    continuations: Sequence[Continuation] = ()
    """Tokens of the prompt with each choice; empty for an endpoint."""

    @property
    def digest(self) -> str:
        """Hash of the prompt, the reference answers and the choices; 16 hexadecimal digits."""
        return hashlib.sha256("\0".join([self.prompt, *self.question.answers, *self.choices]).encode()).hexdigest()[:16]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the prompt, including the longest choice if it has choices."""
        return max([len(self.token_ids), *(one.token_ids.numel() for one in self.continuations)])


@dataclass(frozen=True, kw_only=True)
class Response:
    """What a backend returned for one sample."""

    rendered: RenderedQuestion
    sample: int
    seed: int
    text: str
    num_tokens: int
    finish_reason: str
    likelihoods: Sequence[float] = ()
    """Log-likelihood of each choice, normalized as the task compares them; empty for a sampled response."""
    failure: str = ""
    """Why the server rejected the request; empty if it succeeded."""


SampleRequests = Sequence[tuple[RenderedQuestion, Sequence[tuple[int, int]]]]
"""Questions with the (sample, seed) pairs to generate."""


def render_questions(task: TaskConfig, questions: Sequence[Question], tokenizer: Any) -> list[RenderedQuestion]:
    """Apply the tokenizer's chat template, if the task has chat=true and the tokenizer has one, and tokenize.

    Raises:
        ConfigError: the task has a system prompt, but no chat template applies.
        DataError: a prompt has no tokens, or a choice adds none to it.
    """
    templated = task.chat and tokenizer.chat_template is not None
    if task.system_prompt is not None and not templated:
        raise ConfigError(
            f"task {task.name} has a system_prompt, which needs chat=true and a tokenizer with a chat template. Set "
            "system_prompt=null."
        )
    prompts = [
        apply_chat_template(question.text, tokenizer, system_prompt=task.system_prompt) if templated else question.text
        for question in questions
    ]
    special = adds_special_tokens("auto" if templated else "none", tokenizer)
    rendered = [
        _render_question(task, question, prompt, ids, tokenizer, templated=templated, special=special)
        for question, prompt, ids in zip(
            questions, prompts, tokenize(prompts, tokenizer, special_tokens=special), strict=True
        )
    ]
    empty = next((one for one in rendered if not one.token_ids), None)
    if empty is not None:
        raise DataError(f"question {empty.question.index} of task {task.name} has no tokens: {empty.prompt!r}.")
    return rendered


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
    choices = choice_texts(task, question, templated=templated)
    continuations = _continuations(prompt, ids, choices, tokenizer, special=special)
    for choice, continuation in zip(choices, continuations, strict=True):
        if continuation.start >= continuation.token_ids.numel():
            raise DataError(
                f"question {question.index} of task {task.name}: the choice {choice!r} adds no tokens to the prompt. "
                "Change likelihood.before or the choice."
            )
    return RenderedQuestion(
        question=question, prompt=prompt, token_ids=ids, choices=choices, continuations=continuations
    )


def sample_responses(
    engine: Engine,
    task: TaskConfig,
    requests: SampleRequests,
    *,
    stop_token_ids: tuple[int, ...],
    max_model_len: int,
    max_requests: int,
    decode: Any,
) -> Iterator[Response]:
    """Sample responses and yield them in completion order; every rank of the engine takes part.

    Args:
        engine: that samples.
        task: sampling parameters and stops.
        requests: questions of this engine with their samples.
        stop_token_ids: tokens that end a response.
        max_model_len: tokens of prompt and response that the engine supports.
        max_requests: requests that the engine holds at a time.
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
    engine_requests = (
        Request(
            key=key,
            token_ids=torch.tensor(rendered.token_ids),
            seeds=tuple(seed for _, seed in samples),
            max_new_tokens=min(sampling.max_new_tokens, max_model_len - len(rendered.token_ids)),
        )
        for key, (rendered, samples) in enumerate(requests)
    )
    for finished in engine.generate(iter(engine_requests), params, max_requests=max_requests):
        rendered, samples = requests[finished.key]
        sample, seed = samples[finished.sample]
        text, is_stopped = truncate_at_stop(decode(finished.completion.token_ids), sampling.stop)
        yield Response(
            rendered=rendered,
            sample=sample,
            seed=seed,
            text=text,
            num_tokens=finished.completion.token_ids.numel(),
            finish_reason="stop" if is_stopped else finished.completion.finish_reason,
        )


def truncate_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Cut a text before the first stop string; return it, and whether it contained one."""
    positions = [position for position in (text.find(stop) for stop in stops) if position >= 0]
    return (text[: min(positions)], True) if positions else (text, False)


def choice_texts(task: TaskConfig, question: Question, *, templated: bool = False) -> list[str]:
    """Return the choices as texts after the prompt, separator included; empty unless task.likelihood is set.

    Args:
        task: benchmark of the question.
        question: with its choices.
        templated: whether a chat template ends the prompt, so that no separator is needed.
    """
    if task.likelihood is None:
        return []
    before = "" if templated else task.likelihood.before
    return [before + choice for choice in _choices(task.likelihood, question)]


def _choices(section: LikelihoodSection, question: Question) -> Sequence[str]:
    return LETTERS[: len(question.choices)] if section.of == "letters" else question.choices


def choice_response(
    task: TaskConfig, rendered: RenderedQuestion, seed: int, likelihoods: Sequence[float], lengths: Sequence[int]
) -> Response:
    """Return the letter of the most likely choice as a response; the first one among equals.

    Args:
        task: with likelihood set.
        rendered: the question.
        seed: of the sample.
        likelihoods: log-likelihood of each choice.
        lengths: number of tokens of each choice.
    """
    assert task.likelihood is not None
    choices = _choices(task.likelihood, rendered.question)
    divisors = [max(1, len(choice)) if task.likelihood.normalize == "characters" else 1 for choice in choices]
    scores = [likelihood / divisor for likelihood, divisor in zip(likelihoods, divisors, strict=True)]
    best = scores.index(max(scores))
    return Response(
        rendered=rendered,
        sample=0,
        seed=seed,
        text=LETTERS[best],
        num_tokens=lengths[best],
        finish_reason="stop",
        likelihoods=scores,
    )


def choose_by_likelihood(engine: Engine, task: TaskConfig, requests: SampleRequests) -> Iterator[Response]:
    """Yield the most likely choice of every question; every rank of the engine takes part, its leader gets them."""
    requests = engine.place.from_leader(requests)
    for batch in batched(requests, QUESTIONS_PER_BATCH):
        scores = iter(engine.loglikelihood([one for rendered, _ in batch for one in rendered.continuations]))
        for rendered, ((_, seed),) in batch if engine.place.is_leader else ():
            logprobs = [next(scores) for _ in rendered.continuations]
            sums, lengths = [float(one.sum()) for one in logprobs], [one.numel() for one in logprobs]
            yield choice_response(task, rendered, seed, sums, lengths)


def _continuations(
    prompt: str, ids: Sequence[int], choices: Sequence[str], tokenizer: Any, *, special: bool
) -> list[Continuation]:
    """Tokenize the prompt with each choice; white space at the end of the prompt counts as part of the choice.

    Args:
        prompt: text of the prompt.
        ids: tokens of the prompt.
        choices: texts after the prompt.
        tokenizer: of the model.
        special: whether to add the tokenizer's special tokens.
    """
    if not choices:
        return []
    head = ids
    if prompt != prompt.rstrip():
        (head,) = tokenize([prompt.rstrip()], tokenizer, special_tokens=special)
    wholes = tokenize([prompt + choice for choice in choices], tokenizer, special_tokens=special)
    if not head:  # a first token has no log-probability without a token before it
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        head, wholes = [first], [[first, *whole] for whole in wholes]
    return [Continuation(token_ids=torch.tensor(whole), start=len(head)) for whole in wholes]


def batched(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Yield the items in slices of at most ``size``."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
