"""Run code written by a model against tests, in a sandbox.

Sources: the test programs of HumanEval, arXiv 2107.03374 section 2.2 and its repository; MBPP, arXiv 2108.07732
section 2.1.
"""

import re
from typing import Any, Literal

from megatron_rl.errors import RewardError
from megatron_rl.rewards.types import RewardInput
from megatron_rl.sandbox import Limits, run_program

BLOCK = re.compile(r"```([\w+-]*)[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
PYTHON = ("", "python", "py", "python3")


def code_tests(
    sample: RewardInput,
    style: Literal["humaneval", "mbpp"] = "humaneval",
    timeout_s: float = 3.0,
    memory_gb: float = 1.0,
    allow_unisolated: bool = False,
) -> float:
    """Return 1 if the code in a response passes all tests of its problem, else 0.

    Args:
        style: format of the problem's columns. humaneval: prompt, test, entry_point; mbpp: test_list, and
            test_setup_code or test_imports.
        timeout_s: wall-clock time for code and tests together.
        memory_gb: address space, in GiB.
        allow_unisolated: whether to run the code on a machine that cannot isolate it.

    Raises:
        RewardError: the code cannot be isolated here and ``allow_unisolated`` is not set, or a column is missing.
    """
    limits = Limits(seconds=timeout_s, memory_bytes=int(memory_gb * 2**30))
    return float(run_program(program(sample, style), limits, allow_unisolated=allow_unisolated).status == "passed")


def program(sample: RewardInput, style: Literal["humaneval", "mbpp"]) -> str:
    """Return code and tests as one program.

    Raises:
        RewardError: the problem lacks a column.
    """
    if style == "humaneval":
        prompt, test, entry = (_column(sample, name) for name in ("prompt", "test", "entry_point"))
        head = f"def {entry}("
        code = fenced(sample.response, head)
        if code is not None and head in code:
            # the problem's imports and helpers, then the response's complete function
            whole = prompt.partition(head)[0] + code
        else:
            whole = prompt + (code or sample.response)
        return f"{whole}\n\n{test}\n\ncheck({entry})\n"
    metadata = sample.metadata
    imports = metadata.get("test_setup_code") or "\n".join(metadata.get("test_imports") or ())
    return "\n\n".join([imports, fenced(sample.response, "def ") or sample.response, *_column(sample, "test_list")])


def fenced(response: str, text: str) -> str | None:
    """Return the last fenced Python block that contains a text, or else the last one; None if there is no block.

    A block at the end of the response need not be closed.
    """
    blocks = [code for language, code in BLOCK.findall(response) if language.lower() in PYTHON]
    return next((code for code in reversed(blocks) if text in code), blocks[-1] if blocks else None)


def _column(sample: RewardInput, name: str) -> Any:
    if not sample.metadata.get(name):
        raise RewardError(f"the problem has no column {name!r}. Columns: {', '.join(sample.metadata)}.")
    return sample.metadata[name]
