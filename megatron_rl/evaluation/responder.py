"""Responses of an engine to questions."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_rl.config.evaluation import TaskConfig
from megatron_rl.data.templates import adds_special_tokens, tokenize
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.evaluation.questions import Question
from megatron_rl.rollout.engine import Engine, Request
from megatron_rl.types import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question as the model sees it."""

    question: Question
    prompt: str
    """With chat template."""
    token_ids: Sequence[int]

    @property
    def digest(self) -> str:
        """Of what is asked and what is right."""
        return hashlib.sha256("\0".join([self.prompt, *self.question.answers]).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Response:
    """What came back for one sample."""

    asked: Asked
    sample: int
    seed: int
    text: str
    num_tokens: int
    finish_reason: str


def as_asked(task: TaskConfig, questions: Sequence[Question], tokenizer: Any) -> list[Asked]:
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
    prompts = [_in_chat(task, question.text, tokenizer) if templated else question.text for question in questions]
    special = adds_special_tokens("auto" if templated else "none", tokenizer)
    asked = [
        Asked(question=question, prompt=prompt, token_ids=ids)
        for question, prompt, ids in zip(
            questions, prompts, tokenize(prompts, tokenizer, special_tokens=special), strict=True
        )
    ]
    empty = next((one for one in asked if not one.token_ids), None)
    if empty is not None:
        raise DataError(f"question {empty.question.index} of task {task.name} has no tokens: {empty.prompt!r}.")
    return asked


def respond(
    engine: Engine,
    task: TaskConfig,
    wanted: Sequence[tuple[Asked, Sequence[tuple[int, int]]]],
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


def _in_chat(task: TaskConfig, text: str, tokenizer: Any) -> str:
    messages = [{"role": "user", "content": text}]
    if task.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": task.system_prompt})
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(rendered, str)
    return rendered
