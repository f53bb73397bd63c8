"""State of one rollout in progress, with or without an environment that replies to the policy."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.environments.base import Environment, Episode
from megatron_rl.rewards.types import RewardResult
from megatron_rl.rollout.engines.base import Request
from megatron_rl.rollout.engines.sampling import sample_seed
from megatron_rl.rollout.partial import Observation, Part, PartialRollout, all_tokens
from megatron_rl.types import Completion, FinishReason, Prompt, Rollout


@dataclass(frozen=True, kw_only=True)
class MultiTurn:
    """Settings of multi-turn rollouts."""

    environment: Environment
    max_turns: int
    """Maximum number of responses of the policy in one conversation."""
    template: str
    """Text between two responses of the policy; {observation} is replaced by the environment's observation."""


@dataclass(frozen=True, kw_only=True)
class RolloutLimits:
    """Limits and settings that apply to every conversation of a job."""

    max_new_tokens: int
    """Maximum number of tokens that the policy samples in one conversation, over all turns."""
    max_tokens_per_round: int | None
    """Maximum number of tokens that the policy samples in one conversation during this job; longer ones stay
    unfinished. None: no limit."""
    max_length: int
    """Tokens of the longest sequence, including the prompt and observations."""
    multi_turn: MultiTurn | None
    """None: a sample is one response."""
    encode: Callable[[str], Sequence[int]]
    """Tokenize an observation, without special tokens."""
    decode: Callable[[Tensor], str]
    """Text of token ids, without special tokens."""


class Conversation:
    """A sample in progress, turn by turn; it is kept as tokens, so that no response is tokenized again."""

    def __init__(self, prompt: Prompt, sample: PartialRollout, limits: RolloutLimits) -> None:
        self.prompt = prompt
        self.sample = sample
        self.step_rewards: dict[int, float] = {}
        """Rewards of the environment so far, by the index of each turn's last token in the sequence."""
        self.finish_reason: FinishReason | None = None
        """None while the conversation is not finished."""
        self.failure = ""
        """Error of the environment; empty if there was none."""
        self._limits = limits
        self._num_sampled_before = sample.num_sampled
        self._num_turns = 0
        self._turn: list[Tensor] = []
        self._episode: Episode | None = None
        if limits.multi_turn is not None:
            self._guarded(self._begin)

    @property
    def seed(self) -> int:
        """Seed of the next request; every part of a sample has its own, so that their draws are independent."""
        parts = len(self.sample.parts)
        return sample_seed(self.sample.seed, parts) if parts else self.sample.seed

    @property
    def num_tokens_left(self) -> int:
        """Number of tokens that the next request may sample, within the limits of the sample and of this job."""
        num_tokens_left, limit = self._num_tokens_left(self.sample), self._limits.max_tokens_per_round
        if limit is None:
            return num_tokens_left
        return min(num_tokens_left, max(0, limit - (self.sample.num_sampled - self._num_sampled_before)))

    def take(self, completion: Completion) -> bool:
        """Add the engine's completion; return True if the conversation continues in this job."""
        if completion.token_ids.numel():
            self.sample = self.sample.with_part(completion)
            self._turn.append(completion.token_ids)
        if completion.finish_reason == "abort":
            return False
        if completion.finish_reason == "length":
            self.finish_reason = None if self._num_tokens_left(self.sample) else "length"
            return False
        if self._episode is None:
            self.finish_reason = "stop"
            return False
        self._guarded(self._reply)
        return self.finish_reason is None and self.num_tokens_left > 0

    def rollout(self, text: str, result: RewardResult) -> Rollout:
        """Return the finished rollout.

        Args:
            text: as returned by ``text()``.
            result: result of the reward functions.
        """
        assert self.finish_reason is not None
        parts, length = self.sample.parts, self.prompt.token_ids.numel()
        versions = [torch.full((length,), -1), *(torch.full_like(p.token_ids, _version(p)) for p in parts)]
        logprobs = [torch.zeros(length), *(_logprobs(p) for p in parts)]
        policy_versions = torch.cat(versions).int()
        is_ok = result.status == "ok" and not self.failure
        reward_parts, environment_reward = dict(result.parts), sum(self.step_rewards.values())
        if self._episode is not None:
            reward_parts["environment"] = environment_reward
        return Rollout(
            token_ids=all_tokens(self.prompt, self.sample),
            loss_mask=policy_versions >= 0,
            rollout_logprobs=torch.cat(logprobs),
            text=text,
            finish_reason=self.finish_reason,
            policy_versions=policy_versions,
            seed=self.sample.seed,
            reward=result.total + environment_reward if is_ok else float("nan"),
            reward_parts=reward_parts if is_ok else {},
            status="environment_error" if self.failure else result.status,
            failure=self.failure or result.message,
            step_rewards=self.step_rewards if is_ok else {},
            routing=next((p.routing for p in reversed(parts) if isinstance(p, Completion)), None),
        )

    def text(self) -> str:
        """Return the text of everything after the prompt, responses and observations."""
        token_ids = [part.token_ids for part in self.sample.parts]
        return self._limits.decode(torch.cat(token_ids)) if token_ids else ""

    def _begin(self) -> None:
        """Begin the episode and replay the turns that were already sampled."""
        assert self._limits.multi_turn is not None
        self._episode = self._limits.multi_turn.environment.begin(self.prompt, self.sample.seed)
        length = self.prompt.token_ids.numel()
        for part in self.sample.parts:
            if isinstance(part, Completion):
                self._turn.append(part.token_ids)
            else:
                self._step(length)
            length += part.token_ids.numel()

    def _reply(self) -> None:
        """Pass the turn to the environment and append its observation."""
        multi_turn = self._limits.multi_turn
        observation = self._step(all_tokens(self.prompt, self.sample).numel())
        assert multi_turn is not None
        if observation is None:
            self.finish_reason = "stop"
            return
        if self._num_turns == multi_turn.max_turns:
            self.finish_reason = "length"
            return
        text = multi_turn.template.replace("{observation}", observation)
        tokens = torch.tensor(list(self._limits.encode(text)), dtype=torch.int64)
        longer = self.sample.with_part(Observation(token_ids=tokens))
        if self._num_tokens_left(longer):
            self.sample = longer
        else:
            self.finish_reason = "length"

    def _step(self, length: int) -> str | None:
        """Pass the turn that ends at ``length`` tokens of the sequence to the environment; return its observation."""
        assert self._episode is not None
        turn = self._episode.step(self._limits.decode(torch.cat(self._turn)))
        if not math.isfinite(turn.reward):
            raise ValueError(f"the reward of a turn is {turn.reward}, expected a finite number")
        self._turn = []
        self._num_turns += 1
        self.step_rewards[length - 1] = self.step_rewards.get(length - 1, 0.0) + turn.reward
        return turn.observation

    def _guarded(self, call: Callable[[], None]) -> None:
        """Call the environment; an exception ends the conversation with a failure."""
        try:
            call()
        except Exception as error:  # a user's environment may raise anything: its sample fails, the run continues
            self.finish_reason, self.failure = "stop", f"the environment raised {error!r}"

    def _num_tokens_left(self, sample: PartialRollout) -> int:
        """Number of tokens that may still be sampled before the sample ends."""
        length = self.prompt.token_ids.numel() + sum(part.token_ids.numel() for part in sample.parts)
        return max(0, min(self._limits.max_new_tokens - sample.num_sampled, self._limits.max_length - length))


def new_request(key: int, conversations: Sequence[Conversation]) -> Request:
    """Return a request for conversations with identical tokens so far."""
    first = conversations[0]
    return Request(
        key=key,
        token_ids=all_tokens(first.prompt, first.sample),
        seeds=tuple(conversation.seed for conversation in conversations),
        max_new_tokens=first.num_tokens_left,
    )


def _version(part: Part) -> int:
    return part.policy_version if isinstance(part, Completion) else -1


def _logprobs(part: Part) -> Tensor:
    return part.logprobs if isinstance(part, Completion) else torch.zeros(part.token_ids.numel())
