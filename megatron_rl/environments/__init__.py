"""Problems of several turns: an environment answers what the policy says."""

from megatron_rl.config.plugins import load_symbol
from megatron_rl.environments.base import Environment, Episode, Turn
from megatron_rl.environments.guess_number import GuessNumber

ENVIRONMENTS: dict[str, type[Environment]] = {"guess_number": GuessNumber}


def build_environment(name: str, options: dict[str, object]) -> Environment:
    """An environment by its registered name or as ``package.module:symbol``.

    Raises:
        ConfigError: there is none of that name, or it does not take the options.
    """
    made: Environment = load_symbol(name, ENVIRONMENTS, "rollout.environment")(**options)
    return made


__all__ = ["ENVIRONMENTS", "Environment", "Episode", "Turn", "build_environment"]
