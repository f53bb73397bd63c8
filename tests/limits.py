"""Timeouts of the tests."""

from dataclasses import replace

from megatron_rl.config.evaluation import TaskConfig

LIMIT_S = 900
"""Timeout of one wait. It only guards against hangs: a busy machine is ten times slower than an idle one."""


def with_long_timeout(task: TaskConfig) -> TaskConfig:
    """Return the task with 50 s for each program, enough on a busy machine; no program of the tests hangs."""
    if task.scorer.name != "code_tests":
        return task
    return replace(task, scorer=replace(task.scorer, options={**task.scorer.options, "timeout_s": 50.0}))
