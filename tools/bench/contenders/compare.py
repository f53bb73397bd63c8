"""Run the contenders in turns and check that all do the same work."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from contenders.contender import Contender, ContenderFailed, Step
from contenders.workload import Workload

SAME_WEIGHTS = 1e-6
COUNTED = ("sequences", "new_tokens", "tokens", "updates")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Measured steps of the contenders, by round, without the warm-up."""

    size: str
    workload: Workload
    num_parameters: int
    steps: Mapping[str, list[Step]]


def compare(
    size: str, workload: Workload, contenders: Mapping[str, tuple[str, str]], *, warmup: int, rounds: int
) -> Comparison:
    """Run rounds in which every contender makes one step while the others wait.

    Args:
        contenders: name -> (module, interpreter).
        warmup: unmeasured rounds.
        rounds: measured rounds after them.

    Raises:
        ContenderFailed: a contender exited, hung or did other work than the rest.
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
    """Check that a step sampled every sequence at exactly the requested length and made one update.

    Raises:
        ContenderFailed: it did other work.
    """
    prompt = len(workload.prompts()[0])
    expected = {
        "sequences": workload.num_sequences,
        "new_tokens": workload.num_sequences * workload.new_tokens,
        "tokens": workload.num_sequences * (prompt + workload.new_tokens),
        "updates": 1,
    }
    done = {key: step.work[key] for key in COUNTED}
    if done != expected:
        raise ContenderFailed(f"{name} did {done} in a step, expected {expected}: its figures would not be comparable.")


def check_models(contenders: list[Contender], num_steps: int) -> None:
    """Check that all contenders started from the same weights and changed them in every step.

    Raises:
        ContenderFailed: a contender did not.
    """
    first = contenders[0]
    for contender in contenders:
        difference = abs(contender.first_weights - first.first_weights)
        if contender.num_parameters != first.num_parameters or difference > SAME_WEIGHTS * abs(first.first_weights):
            raise ContenderFailed(
                f"{contender.name} started with {contender.num_parameters} parameters that sum to "
                f"{contender.first_weights}, {first.name} with {first.num_parameters} and {first.first_weights}."
            )
        if contender.num_changes != num_steps:
            raise ContenderFailed(
                f"{contender.name} changed its weights in {contender.num_changes} of {num_steps} steps."
            )
