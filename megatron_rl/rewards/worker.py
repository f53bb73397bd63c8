"""The loop of a reward worker process."""

import resource
import signal
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection

from megatron_rl.config.reward import RewardFunctionSection
from megatron_rl.rewards.registry import Grader, build_grader
from megatron_rl.rewards.types import RewardInput, RewardResult

FunctionSets = Mapping[str, Sequence[RewardFunctionSection]]


def work(connection: Connection, functions: FunctionSets, memory_limit_bytes: int) -> None:
    """Send one result per sample of every request until the other end of the connection closes.

    Args:
        functions: named sets of reward functions.
        memory_limit_bytes: limit of the process's address space.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # server.py ignores SIGTERM for the same reason
    resource.setrlimit(resource.RLIMIT_AS, (memory_limit_bytes, memory_limit_bytes))
    graders = {name: build_grader(sections) for name, sections in functions.items()}
    connection.send("ready")
    while True:
        try:
            name, samples = connection.recv()
        except EOFError:
            return
        for sample in samples:
            connection.send(_grade(graders[name], sample))


def _grade(grader: Grader, sample: RewardInput) -> RewardResult:
    try:
        total, parts = grader(sample)
    except Exception as error:  # an error of a reward function is reported, never a silent 0
        message = f"{type(error).__name__}: {error}"[:500]
        return RewardResult(status="reward_error", total=float("nan"), parts={}, message=message)
    return RewardResult(status="ok", total=total, parts=parts)
