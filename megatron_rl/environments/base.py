"""What a problem of several turns is."""

from dataclasses import dataclass
from typing import Protocol

from megatron_rl.types import Prompt


@dataclass(frozen=True)
class Turn:
    """What an environment makes of one response."""

    observation: str | None
    """Text that the policy sees next; None: the episode is over."""
    reward: float = 0.0
    """Of this turn; an episode is worth their sum."""


class Episode(Protocol):
    """One conversation."""

    def step(self, response: str) -> Turn:
        """Answer a response of the policy.

        An interrupted conversation is gone through again with the same responses, so the answers may depend on nothing
        but the prompt, the seed and the responses so far.

        Args:
            response: this turn's, without special tokens.
        """
        ...


class Environment(Protocol):
    """Begins conversations."""

    def begin(self, prompt: Prompt, seed: int) -> Episode:
        """A conversation about a prompt, which is its first message.

        Args:
            seed: different for every sample of a run.
        """
        ...
