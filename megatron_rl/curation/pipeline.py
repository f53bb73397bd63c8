"""Curation of problems into verified training data; every dropped problem has a recorded reason."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from megatron_rl.config.curation import ContaminationSection, CurationConfig, GenerateSection
from megatron_rl.config.data import RowsSection
from megatron_rl.config.evaluation import EvalConfig, TaskConfig, local_rows
from megatron_rl.config.load import load_as
from megatron_rl.curation.contamination import BenchmarkNgrams
from megatron_rl.curation.near_duplicates import near_duplicates
from megatron_rl.curation.rows import Row, Solved
from megatron_rl.curation.text import as_text
from megatron_rl.data.sources import read_rows
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.evaluation.folder import EvalFolder, current_answers
from megatron_rl.evaluation.questions import read_questions

TASK = "problems"
"""Name of the task in the evaluation that solves the problems."""
Item = TypeVar("Item")


class CurationFolder:
    """Paths in the output folder.

    candidates.jsonl  problems that are neither contaminated nor near duplicates
    generated/        the evaluation that solves them
    curated.jsonl     the kept problems, in output.schema
    dropped.jsonl     every other problem, with stage and reason
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.candidates = path / "candidates.jsonl"
        self.generated = path / "generated"
        self.curated = path / "curated.jsonl"
        self.dropped = path / "dropped.jsonl"


@dataclass(frozen=True, kw_only=True)
class Filtered(Generic[Item]):
    """Kept problems, and the reasons why the others were dropped."""

    kept: Sequence[Item]
    dropped: Sequence[Mapping[str, Any]]
    """Rows of dropped.jsonl: problem, stage and reason."""

    def then(self, later: "Filtered[Item]") -> "Filtered[Item]":
        """Return the result of a later filter on the kept problems, with the dropped problems of both."""
        return Filtered(kept=later.kept, dropped=[*self.dropped, *later.dropped])


def split_by_reason(
    rows: Sequence[Item], stage: str, reasons: Sequence[str | None], text: Callable[[Item], str]
) -> Filtered[Item]:
    """Split rows by whether there is a reason to drop them.

    Args:
        rows: to split.
        stage: name of the filter, for dropped.jsonl.
        reasons: reason to drop each row; None to keep it.
        text: text of a row, for dropped.jsonl.
    """
    pairs = list(zip(rows, reasons, strict=True))
    return Filtered(
        kept=[row for row, reason in pairs if reason is None],
        dropped=[
            {"problem": text(row), "stage": stage, "reason": reason} for row, reason in pairs if reason is not None
        ],
    )


def candidates(config: CurationConfig, config_folder: Path) -> Filtered[Row]:
    """Read the problems and drop those without answer, contaminated ones and near duplicates; add prompt_text.

    Args:
        config: of the curation.
        config_folder: folder to which the paths in contamination.tasks are relative.

    Raises:
        DataError: the data or a benchmark cannot be read, or no problem is left.
    """
    rows = [_with_text(row, f"row {number} of {config.data.path}") for number, row in enumerate(read_rows(config.data))]
    filtered = _filtered(config, rows, config_folder)
    if not filtered.kept:
        raise DataError(
            f"all {len(rows)} problems of {config.data.path} were dropped; the first one: {filtered.dropped[0]}. "
            "Check contamination and near_duplicates."
        )
    return filtered


def _filtered(config: CurationConfig, rows: Sequence[Row], config_folder: Path) -> Filtered[Row]:
    no_answer = [
        None if row.get("answer") is not None or config.generate is None else "no answer to grade against"
        for row in rows
    ]
    with_answer = split_by_reason(rows, "no answer", no_answer, _text)
    contaminated = _contamination(config.contamination, with_answer.kept, config_folder)
    clean = with_answer.then(split_by_reason(with_answer.kept, "contamination", contaminated, _text))
    if config.near_duplicates is None:
        return clean
    texts = [_text(row) for row in clean.kept]
    duplicates = near_duplicates(texts, config.near_duplicates)
    reasons = [None if index is None else f"near duplicate of: {texts[index]}" for index in duplicates]
    return clean.then(split_by_reason(clean.kept, "near duplicate", reasons, _text))


def evaluation_of(generate: GenerateSection, config: CurationConfig) -> tuple[EvalConfig, TaskConfig]:
    """Return the configurations of the evaluation that solves the candidates."""
    folder = CurationFolder(Path(config.run.output_dir))
    evaluation = EvalConfig(
        run=replace(config.run, output_dir=str(folder.generated)),
        model=generate.model,
        tasks=[TASK],
        engine=generate.engine,
        grading=generate.grading,
    )
    task = TaskConfig(
        name=TASK,
        version=1,
        source="tools/data/curate.py",
        data=RowsSection(kind="jsonl", path=str(folder.candidates)),
        prompt=generate.prompt,
        system_prompt=generate.system_prompt,
        chat=generate.chat,
        sampling=generate.sampling,
        scorer=generate.scorer,
        gold_response=generate.gold_response,
        majority=False,
    )
    return evaluation, task


def filter_by_pass_rate(config: CurationConfig, rows: Sequence[Row]) -> Filtered[Solved]:
    """Keep the candidates whose graded answers have a pass rate within ``config.pass_rate``; all without generation."""
    if config.generate is None:
        return Filtered(kept=[Solved(row=row, answers=[], difficulty=None) for row in rows], dropped=[])
    answers = current_answers(EvalFolder(CurationFolder(Path(config.run.output_dir)).generated))
    solved = [Solved.of(row, answers[TASK, index], config.labels) for index, row in enumerate(rows)]
    ungraded = [next((one.message for one in each.answers if one.status != "ok"), None) for each in solved]
    graded = split_by_reason(solved, "not graded", ungraded, lambda one: _text(one.row))
    low, high = config.pass_rate.above, config.pass_rate.below
    reasons = [
        None
        if low < one.pass_rate < high
        else f"pass rate {one.pass_rate:g}, expected above {low:g} and below {high:g}"
        for one in graded.kept
    ]
    return graded.then(split_by_reason(graded.kept, "pass rate", reasons, lambda one: _text(one.row)))


def _with_text(row: Row, where: str) -> Row:
    if not row.get("prompt"):
        raise DataError(
            f"{where}: column 'prompt' is missing or empty. Columns: {', '.join(row)}. Set data.schema if the data set "
            "has one of the known schemas."
        )
    return {**row, "prompt_text": as_text(row["prompt"])}


def _text(row: Row) -> str:
    return str(row["prompt_text"])


def _contamination(section: ContaminationSection, rows: Sequence[Row], config_folder: Path) -> list[str | None]:
    questions = {}
    tasks = [load_as(TaskConfig, config_folder / name) for name in section.tasks]
    unknown = sorted(set(section.data) - {task.name for task in tasks})
    if unknown:
        raise ConfigError(
            f"contamination.data.{unknown[0]}: contamination.tasks has no such task. Tasks: "
            f"{', '.join(task.name for task in tasks)}."
        )
    for task in tasks:
        if task.name in section.data:
            task = replace(task, data=local_rows(task.data, section.data[task.name]))
        bare = replace(task, prompt=task.question or task.prompt, few_shot=None)
        questions[task.name] = [question.text for question in read_questions(bare)]
    benchmarks = BenchmarkNgrams(questions, section.ngram)
    shared = [benchmarks.find_shared(_text(row)) for row in rows]
    return [None if one is None else f"shares with {one[0]}: {one[1]}" for one in shared]
