"""How long tests wait before they give up."""

from dataclasses import replace

from megatron_rl.config.evaluation import TaskConfig

LIMIT_S = 900
"""A guard against hangs, which claims nothing about speed: a busy machine is ten times slower than an idle one."""


def patient(task: TaskConfig) -> TaskConfig:
    """The task with as much time for a program as it needs here; none of the tests' programs hangs."""
    if task.scorer.name != "code_tests":
        return task
    return replace(task, scorer=replace(task.scorer, options={**task.scorer.options, "timeout_s": 50.0}))
