"""One sample under way: what the policy says, and what an environment answers."""

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
    """Who answers the policy, and how."""

    environment: Environment
    max_turns: int
    """Responses of the policy."""
    template: str
    """What stands between two responses, around {observation}."""


@dataclass(frozen=True, kw_only=True)
class RolloutLimits:
    """What holds for every conversation of a job."""

    max_new_tokens: int
    """Of the policy, over all turns."""
    max_tokens_now: int | None
    """Of the policy in this job; what is longer stays unfinished. None: no bound."""
    max_length: int
    """Tokens of the longest sequence, observations counted in."""
    dialogue: MultiTurn | None
    """None: a sample is one response."""
    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Tensor], str]


class Conversation:
    """A sample that the engine works at, turn by turn; tokens go in and out, nothing is tokenised again."""

    def __init__(self, prompt: Prompt, sample: PartialRollout, rules: RolloutLimits) -> None:
        self.prompt = prompt
        self.sample = sample
        self.step_rewards: dict[int, float] = {}
        """Of the environment so far, by the last token of each turn."""
        self.finish_reason: FinishReason | None = None
        """None while it is not finished."""
        self.failure = ""
        """How the environment failed; empty when it did not."""
        self._rules = rules
        self._begun_with = sample.num_sampled
        self._num_turns = 0
        self._turn: list[Tensor] = []
        self._episode: Episode | None = None
        if rules.dialogue is not None:
            self._guarded(self._begin)

    @property
    def seed(self) -> int:
        """Of the next turn: the draws of two parts of a sample have nothing in common."""
        parts = len(self.sample.parts)
        return sample_seed(self.sample.seed, parts) if parts else self.sample.seed

    @property
    def room(self) -> int:
        """New tokens that the next turn may have now."""
        room, now = self._room_of(self.sample), self._rules.max_tokens_now
        if now is None:
            return room
        return min(room, max(0, now - (self.sample.num_sampled - self._begun_with)))

    def take(self, completion: Completion) -> bool:
        """The engine's answer; True when the conversation goes on at once."""
        if completion.token_ids.numel():
            self.sample = self.sample.with_part(completion)
            self._turn.append(completion.token_ids)
        if completion.finish_reason == "abort":
            return False
        if completion.finish_reason == "length":
            self.finish_reason = None if self._room_of(self.sample) else "length"
            return False
        if self._episode is None:
            self.finish_reason = "stop"
            return False
        self._guarded(self._answer)
        return self.finish_reason is None and self.room > 0

    def rollout(self, text: str, result: RewardResult) -> Rollout:
        """The finished sample with what ``text`` gave and its grade."""
        assert self.finish_reason is not None
        parts, length = self.sample.parts, self.prompt.token_ids.numel()
        versions = [torch.full((length,), -1), *(torch.full_like(p.token_ids, _version(p)) for p in parts)]
        logprobs = [torch.zeros(length), *(_logprobs(p) for p in parts)]
        policy_versions = torch.cat(versions).int()
        is_ok = result.status == "ok" and not self.failure
        graded, earned = dict(result.parts), sum(self.step_rewards.values())
        if self._episode is not None:
            graded["environment"] = earned
        return Rollout(
            token_ids=all_tokens(self.prompt, self.sample),
            loss_mask=policy_versions >= 0,
            rollout_logprobs=torch.cat(logprobs),
            text=text,
            finish_reason=self.finish_reason,
            policy_versions=policy_versions,
            seed=self.sample.seed,
            reward=result.total + earned if is_ok else float("nan"),
            reward_parts=graded if is_ok else {},
            status="environment_error" if self.failure else result.status,
            failure=self.failure or result.message,
            step_rewards=self.step_rewards if is_ok else {},
            routing=next((p.routing for p in reversed(parts) if isinstance(p, Completion)), None),
        )

    def text(self) -> str:
        """All that was said after the prompt."""
        said = [part.token_ids for part in self.sample.parts]
        return self._rules.decode(torch.cat(said)) if said else ""

    def _begin(self) -> None:
        """Begin the episode, and go through the turns that were taken before."""
        assert self._rules.dialogue is not None
        self._episode = self._rules.dialogue.environment.begin(self.prompt, self.sample.seed)
        length = self.prompt.token_ids.numel()
        for part in self.sample.parts:
            if isinstance(part, Completion):
                self._turn.append(part.token_ids)
            else:
                self._step(length)
            length += part.token_ids.numel()

    def _answer(self) -> None:
        """Let the environment answer the turn."""
        dialogue = self._rules.dialogue
        observation = self._step(all_tokens(self.prompt, self.sample).numel())
        assert dialogue is not None
        if observation is None:
            self.finish_reason = "stop"
            return
        if self._num_turns == dialogue.max_turns:
            self.finish_reason = "length"
            return
        text = dialogue.template.replace("{observation}", observation)
        tokens = torch.tensor(list(self._rules.encode(text)), dtype=torch.int64)
        longer = self.sample.with_part(Observation(token_ids=tokens))
        if self._room_of(longer):
            self.sample = longer
        else:
            self.finish_reason = "length"

    def _step(self, length: int) -> str | None:
        """Let the environment see the turn that ends a sequence of so many tokens."""
        assert self._episode is not None
        turn = self._episode.step(self._rules.decode(torch.cat(self._turn)))
        if not math.isfinite(turn.reward):
            raise ValueError(f"a turn was worth {turn.reward}, expected a finite number")
        self._turn = []
        self._num_turns += 1
        self.step_rewards[length - 1] = self.step_rewards.get(length - 1, 0.0) + turn.reward
        return turn.observation

    def _guarded(self, part: Callable[[], None]) -> None:
        try:
            part()
        except Exception as error:  # a user's environment may raise anything: the sample fails, the run goes on
            self.finish_reason, self.failure = "stop", f"the environment raised {error!r}"

    def _room_of(self, sample: PartialRollout) -> int:
        """New tokens that a sample may have before it ends."""
        length = self.prompt.token_ids.numel() + sum(part.token_ids.numel() for part in sample.parts)
        return max(0, min(self._rules.max_new_tokens - sample.num_sampled, self._rules.max_length - length))


def new_request(key: int, conversations: Sequence[Conversation]) -> Request:
    """A request of samples that have come equally far."""
    first = conversations[0]
    return Request(
        key=key,
        token_ids=all_tokens(first.prompt, first.sample),
        seeds=tuple(conversation.seed for conversation in conversations),
        max_new_tokens=first.room,
    )


def _version(part: Part) -> int:
    return part.policy_version if isinstance(part, Completion) else -1


def _logprobs(part: Part) -> Tensor:
    return part.logprobs if isinstance(part, Completion) else torch.zeros(part.token_ids.numel())
