"""Reading the responses of evaluations and training runs from disk."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_rl.analysis.behaviour import ResponseRecord
from megatron_rl.errors import DataError
from megatron_rl.evaluation.folder import EvalFolder, current_answers, distinct_names, read_questions_of
from megatron_rl.evaluation.majority_vote import shown_answer
from megatron_rl.rollout.serialization import each_rollout


def read_responses(paths: Sequence[Path], *, min_reward: float, answer_shown_by: str | None) -> list[ResponseRecord]:
    """Read all responses of several folders; ``source`` is the folder's name if there is more than one.

    Args:
        paths: each the ``run.output_dir`` of an evaluation or a training run, or a run's ``rollouts/``.
        min_reward: total reward from which on a response of a training run counts as right.
        answer_shown_by: regular expression whose first group is the answer in a response of a training run; None: the
            content of the last \\boxed{}.

    Raises:
        DataError: a folder has no responses.
    """
    sources = [""] if len(paths) == 1 else distinct_names(paths)
    return [
        replace(one, source=source)
        for path, source in zip(paths, sources, strict=True)
        for one in _read_folder(path, min_reward, answer_shown_by)
    ]


def _read_folder(path: Path, min_reward: float, answer_shown_by: str | None) -> Iterator[ResponseRecord]:
    if (path / "answers").is_dir():
        yield from _of_evaluation(EvalFolder(path))
        return
    rollouts = path / "rollouts" if (path / "rollouts").is_dir() else path
    for line in each_rollout(rollouts):
        yield ResponseRecord(
            label=str(line["step"]),
            key=f"{line['step']}/{line['group']}",
            question=line["prompt"],
            response=line["response"],
            is_right=line["status"] == "ok" and line["reward"] >= min_reward,
            num_tokens=sum(line["loss_mask"]),
            is_truncated=line["finish_reason"] == "length",
            has_answer=shown_answer(line["response"], answer_shown_by) is not None,
        )


def _of_evaluation(folder: EvalFolder) -> list[ResponseRecord]:
    questions = read_questions_of(folder)
    records = [
        ResponseRecord(
            label=answer.task,
            key=f"{answer.task}/{answer.question}",
            question=questions[key]["text"],
            response=answer.response,
            is_right=answer.right,
            num_tokens=answer.num_tokens,
            is_truncated=answer.finish_reason == "length",
            has_answer=answer.shown is not None,
        )
        for key, answers in current_answers(folder).items()
        for answer in answers
    ]
    if not records:
        raise DataError(f"{folder.path} has no graded answers. Give the folder of an evaluation that has been started.")
    return records
