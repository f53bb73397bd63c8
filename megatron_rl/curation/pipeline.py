"""Problems to verified data, with a reason for each that is dropped."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from megatron_rl.config.curation import ContaminationSection, CurationConfig, GenerateSection
from megatron_rl.config.data import RowsSection
from megatron_rl.config.evaluation import EvalConfig, TaskConfig, local
from megatron_rl.config.load import load_as
from megatron_rl.curation.contamination import Benchmarks
from megatron_rl.curation.near_duplicates import near_duplicates
from megatron_rl.curation.rows import Row, Solved
from megatron_rl.curation.text import as_text
from megatron_rl.data.sources import read_rows
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.evaluation.folder import EvalFolder, current_answers
from megatron_rl.evaluation.questions import read_questions

TASK = "problems"
"""Name of the task in the evaluation that generates."""
One = TypeVar("One")


class CurationFolder:
    """Names of the files.

    candidates.jsonl  problems that are neither contaminated nor double
    generated/        the evaluation that solves them
    curated.jsonl     what is kept, in the schema asked for
    dropped.jsonl     every other problem, with stage and reason
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.candidates = path / "candidates.jsonl"
        self.generated = path / "generated"
        self.curated = path / "curated.jsonl"
        self.dropped = path / "dropped.jsonl"


@dataclass(frozen=True, kw_only=True)
class Sieved(Generic[One]):
    """What is left of some problems, and why the others are not."""

    kept: Sequence[One]
    dropped: Sequence[Mapping[str, Any]]
    """problem, stage and reason of each."""

    def then(self, later: "Sieved[One]") -> "Sieved[One]":
        """With what a later sieve has left of this one."""
        return Sieved(kept=later.kept, dropped=[*self.dropped, *later.dropped])


def sieve(rows: Sequence[One], stage: str, reasons: Sequence[str | None], text: Callable[[One], str]) -> Sieved[One]:
    """Rows apart by whether there is a reason to drop them.

    Args:
        reasons: of each row; None: it is kept.
        text: what is said of a dropped row.
    """
    both = list(zip(rows, reasons, strict=True))
    return Sieved(
        kept=[row for row, reason in both if reason is None],
        dropped=[
            {"problem": text(row), "stage": stage, "reason": reason} for row, reason in both if reason is not None
        ],
    )


def candidates(config: CurationConfig, config_folder: Path) -> Sieved[Row]:
    """Problems that are neither contaminated nor double, with the column prompt_text.

    Args:
        config_folder: in relation to which the files of tasks are named.

    Raises:
        DataError: the data or a benchmark cannot be read, or nothing is left.
    """
    rows = [_with_text(row, f"row {number} of {config.data.path}") for number, row in enumerate(read_rows(config.data))]
    found = _sieved(config, rows, config_folder)
    if not found.kept:
        raise DataError(
            f"none of the {len(rows)} problems of {config.data.path} is left; of the first one: {found.dropped[0]}. "
            "Look at contamination and near_duplicates."
        )
    return found


def _sieved(config: CurationConfig, rows: Sequence[Row], config_folder: Path) -> Sieved[Row]:
    answers = [
        None if row.get("answer") is not None or config.generate is None else "no answer to grade by" for row in rows
    ]
    graded = sieve(rows, "no answer", answers, _text)
    contaminated = _contamination(config.contamination, graded.kept, config_folder)
    clean = graded.then(sieve(graded.kept, "contamination", contaminated, _text))
    if config.near_duplicates is None:
        return clean
    texts = [_text(row) for row in clean.kept]
    same = near_duplicates(texts, config.near_duplicates)
    reasons = [None if place is None else f"nearly the same as: {texts[place]}" for place in same]
    return clean.then(sieve(clean.kept, "near duplicate", reasons, _text))


def evaluation_of(generate: GenerateSection, config: CurationConfig) -> tuple[EvalConfig, TaskConfig]:
    """The evaluation that solves the candidates."""
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


def solved(config: CurationConfig, rows: Sequence[Row]) -> Sieved[Solved]:
    """Candidates with the answers that were generated to them, of the pass rate that is wanted."""
    if config.generate is None:
        return Sieved(kept=[Solved(row=row, answers=[], difficulty=None) for row in rows], dropped=[])
    answers = current_answers(EvalFolder(CurationFolder(Path(config.run.output_dir)).generated))
    found = [Solved.of(row, answers[TASK, place], config.labels) for place, row in enumerate(rows)]
    ungraded = [next((one.message for one in each.answers if one.status != "ok"), None) for each in found]
    graded = sieve(found, "not graded", ungraded, lambda one: _text(one.row))
    low, high = config.pass_rate.above, config.pass_rate.below
    reasons = [
        None if low < one.pass_rate < high else f"pass rate {one.pass_rate:g}, wanted above {low:g} and below {high:g}"
        for one in graded.kept
    ]
    return graded.then(sieve(graded.kept, "pass rate", reasons, lambda one: _text(one.row)))


def _with_text(row: Row, where: str) -> Row:
    if not row.get("prompt"):
        raise DataError(
            f"{where}: column 'prompt' is missing or empty. Columns: {', '.join(row)}. Set data.schema, if the set has "
            "a published one."
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
            f"contamination.data.{unknown[0]}: there is no such task. Tasks: {', '.join(task.name for task in tasks)}."
        )
    for task in tasks:
        if task.name in section.data:
            task = replace(task, data=local(task.data, section.data[task.name]))
        bare = replace(task, prompt=task.question or task.prompt, few_shot=None)
        questions[task.name] = [question.text for question in read_questions(bare)]
    benchmarks = Benchmarks(questions, section.ngram)
    found = [benchmarks.found_in(_text(row)) for row in rows]
    return [None if one is None else f"shares with {one[0]}: {one[1]}" for one in found]
