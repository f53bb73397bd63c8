"""Solved problems as rows of published data schemas. Pure functions."""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rl.evaluation.answers import GradedAnswer
from megatron_rl.reporting.stats import mean

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A problem with the graded answers of a model."""

    row: Row
    answers: Sequence[GradedAnswer]
    """Empty if nothing was generated."""
    difficulty: str | None
    """Label of the pass rate; None if nothing was generated."""

    @classmethod
    def of(cls, row: Row, answers: Sequence[GradedAnswer], labels: Mapping[str, float]) -> "Solved":
        """Make a solved problem whose difficulty is the label of its pass rate."""
        return cls(row=row, answers=answers, difficulty=difficulty_of(mean([one.right for one in answers]), labels))

    @property
    def pass_rate(self) -> float:
        """Share of right answers; NaN if nothing was generated."""
        return mean([one.right for one in self.answers])


def difficulty_of(pass_rate: float, labels: Mapping[str, float]) -> str:
    """Return the label with the largest lower bound that the pass rate reaches.

    Args:
        pass_rate: share of right answers.
        labels: label -> lower bound.
    """
    return max((bound, label) for label, bound in labels.items() if pass_rate >= bound)[1]


def problem(solved: Solved) -> Row:
    """Return a row for a run's data.train, with all columns that reward functions may need."""
    row = {key: value for key, value in solved.row.items() if key not in DROPPED}
    if not solved.answers:
        return row
    return {**row, "pass_rate": solved.pass_rate, "num_samples": len(solved.answers), "difficulty": solved.difficulty}


def openr1_math(solved: Solved) -> Row:
    """Return a row with the columns of open-r1/OpenR1-Math-220k, pass_rate and difficulty."""
    prompt = solved.row["prompt_text"]
    checks = [one.right for one in solved.answers]
    return {
        "problem": prompt,
        "solution": solved.row.get("demonstration") or "",
        "answer": solved.row.get("answer"),
        "problem_type": solved.row.get("problem_type"),
        "question_type": solved.row.get("question_type"),
        "source": solved.row.get("source"),
        "uuid": str(uuid.uuid5(uuid.NAMESPACE_URL, prompt)),
        "is_reasoning_complete": [one.finish_reason == "stop" for one in solved.answers],
        "generations": [one.response for one in solved.answers],
        "correctness_math_verify": checks,
        "correctness_llama": None,
        "finish_reasons": [one.finish_reason for one in solved.answers],
        "correctness_count": sum(checks),
        "messages": _turns(solved, "role", "content"),
        "pass_rate": solved.pass_rate,
        "difficulty": solved.difficulty,
    }


def conversations(solved: Solved) -> Row:
    """Return a row as in open-thoughts/OpenThoughts-114k and Bespoke-Stratos-17k, with pass_rate and difficulty."""
    return {
        "system": "",
        "conversations": _turns(solved, "from", "value"),
        "source": solved.row.get("source"),
        "answer": solved.row.get("answer"),
        "pass_rate": solved.pass_rate,
        "difficulty": solved.difficulty,
    }


def _turns(solved: Solved, role_key: str, text_key: str) -> list[dict[str, str]]:
    """Return the problem as the user's turn, and its shortest right response, if any, as the assistant's."""
    turns = [{role_key: "user", text_key: solved.row["prompt_text"]}]
    right = [one for one in solved.answers if one.right]
    if right:
        turns.append({role_key: "assistant", text_key: min(right, key=lambda one: one.num_tokens).response})
    return turns


DROPPED = ("generations", "messages", "conversations", "prompt_text")
"""Columns of a source that are dropped, because they would contradict the new ones."""
OUTPUTS: Mapping[str, Callable[[Solved], Row]] = {
    "problems": problem,
    "openr1_math": openr1_math,
    "conversations": conversations,
}
"""output.schema -> function that makes a row."""
