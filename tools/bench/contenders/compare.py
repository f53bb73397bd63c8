"""Let the contenders take turns, and check that they all did the same work."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from contenders.contender import Contender, ContenderFailed, Step
from contenders.workload import Workload

SAME_WEIGHTS = 1e-6
COUNTED = ("sequences", "new_tokens", "tokens", "updates")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Measured steps of some contenders, round by round, without the warm-up."""

    size: str
    workload: Workload
    num_parameters: int
    steps: Mapping[str, list[Step]]


def compare(
    size: str, workload: Workload, contenders: Mapping[str, tuple[str, str]], *, warmup: int, rounds: int
) -> Comparison:
    """Rounds in which every contender makes one step while the others wait.

    Args:
        contenders: name -> (module, interpreter).

    Raises:
        ContenderFailed: one died, or they did not all do the same work.
    """
    with ExitStack() as stack:
        started = [
            stack.enter_context(Contender(name, module, python, workload))
            for name, (module, python) in contenders.items()
        ]
        steps: dict[str, list[Step]] = {contender.name: [] for contender in started}
        for number in range(warmup + rounds):
            for contender in started:
                step = contender.step()
                check_work(contender.name, step, workload)
                if number >= warmup:
                    steps[contender.name].append(step)
        check_models(started, warmup + rounds)
        return Comparison(size=size, workload=workload, num_parameters=started[0].num_parameters, steps=steps)


def check_work(name: str, step: Step, workload: Workload) -> None:
    """Every sequence was sampled, to exactly the length asked for, and learned from once.

    Raises:
        ContenderFailed: it was not.
    """
    prompt = len(workload.prompts()[0])
    wanted = {
        "sequences": workload.num_sequences,
        "new_tokens": workload.num_sequences * workload.new_tokens,
        "tokens": workload.num_sequences * (prompt + workload.new_tokens),
        "updates": 1,
    }
    done = {key: step.work[key] for key in COUNTED}
    if done != wanted:
        raise ContenderFailed(f"{name} did {done} in a step, expected {wanted}: its figures would not compare.")


def check_models(contenders: list[Contender], num_steps: int) -> None:
    """All began with the same weights and changed them in every step.

    Raises:
        ContenderFailed: they did not.
    """
    first = contenders[0]
    for contender in contenders:
        apart = abs(contender.first_weights - first.first_weights)
        if contender.num_parameters != first.num_parameters or apart > SAME_WEIGHTS * abs(first.first_weights):
            raise ContenderFailed(
                f"{contender.name} began with {contender.num_parameters} parameters that sum to "
                f"{contender.first_weights}, {first.name} with {first.num_parameters} and {first.first_weights}."
            )
        if contender.num_changes != num_steps:
            raise ContenderFailed(
                f"{contender.name} changed its weights in {contender.num_changes} of {num_steps} steps."
            )
