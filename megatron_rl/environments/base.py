"""The protocol of environments for multi-turn rollouts."""

from dataclasses import dataclass
from typing import Protocol

from megatron_rl.types import Prompt


@dataclass(frozen=True)
class Turn:
    """The reaction of an environment to one response."""

    observation: str | None
    """Text that the policy sees next; None ends the episode."""
    reward: float = 0.0
    """Reward of this turn; the reward of an episode is the sum over its turns."""


class Episode(Protocol):
    """One conversation with the policy."""

    def step(self, response: str) -> Turn:
        """Reply to a response of the policy.

        An interrupted conversation is replayed with the same responses, so the replies may depend only on the prompt,
        the seed and the responses so far.

        Args:
            response: text of this turn's response, without special tokens.
        """
        ...


class Environment(Protocol):
    """Starts an episode for every sample."""

    def begin(self, prompt: Prompt, seed: int) -> Episode:
        """Start an episode.

        Args:
            prompt: prompt of the sample, the first message of the conversation.
            seed: seed of the sample, different for every sample of a run.
        """
        ...
