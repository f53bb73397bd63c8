"""Convert rows of published reasoning data sets to common columns.

Every converted row has the columns prompt, answer, demonstration, source and licence beside its original columns.
Source of the schemas: the cards and files of the data sets.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rl.data.generated.countdown import PROMPT as COUNTDOWN_PROMPT
from megatron_rl.errors import DataError
from megatron_rl.rewards.math import last_boxed

Row = Mapping[str, Any]
NONCOMMERCIAL = "cc-by-nc-sa-4.0"


@dataclass(frozen=True, kw_only=True)
class DatasetSchema:
    """The schema of one or more published data sets."""

    sets: Sequence[str]
    """Hub ids of the data sets with this schema."""
    licence: str
    """Licence according to their cards; "see card" if unknown to this project."""
    read: Callable[[Row], Row]
    """Convert a row to the columns prompt (text or messages), answer and demonstration (None if there is none). Raises
    KeyError if a column is missing, ValueError if the row contains no problem."""


def check_licence(path: str | None, schema: str | None, *, allow_noncommercial: bool) -> None:
    """Check the licence of a data set by its hub id, or else by its schema, before anything is read.

    Raises:
        DataError: the schema is unknown, or the licence forbids commercial use and ``allow_noncommercial`` is not set.
    """
    if schema is not None and schema not in SCHEMAS:
        raise DataError(f"data source schema={schema!r} is unknown. Expected one of: {', '.join(SCHEMAS)}.")
    licence = licence_of(path) or (None if schema is None else SCHEMAS[schema].licence)
    if licence == NONCOMMERCIAL and not allow_noncommercial:
        raise DataError(
            f"data source {path} has the licence {licence}, which forbids commercial use. Set allow_noncommercial=true "
            "on the source if your use is not commercial, or use generated data (kind=task)."
        )


def read_schema(rows: Sequence[Row], schema: str, *, path: str | None) -> list[Row]:
    """Return rows of a schema with the common columns.

    Args:
        path: path or hub id of the data set, for error messages and the columns source and licence.

    Raises:
        DataError: a row has another schema.
    """
    dataset_schema = SCHEMAS[schema]
    return [_common(row, dataset_schema, path, number) for number, row in enumerate(rows)]


def licence_of(path: str | None) -> str | None:
    """Return the licence of a data set by its hub id; None if the data set is unknown to this project."""
    return next((schema.licence for schema in SCHEMAS.values() if path in schema.sets), None)


def _common(row: Row, schema: DatasetSchema, path: str | None, number: int) -> Row:
    where = f"row {number} of {path}"
    try:
        common = schema.read(row)
    except KeyError as error:
        raise DataError(f"{where}: column {error} is missing. Columns: {', '.join(row)}.") from error
    except (ValueError, TypeError, IndexError) as error:
        raise DataError(f"{where}: {error}. The row has another schema or is damaged.") from error
    return {**row, "source": row.get("source") or path, "licence": licence_of(path) or "unknown", **common}


def _openr1_math(row: Row) -> Row:
    """The demonstration is the first generation that was verified as correct."""
    checks = row.get("correctness_math_verify") or ()
    verified = [text for text, is_verified in zip(row.get("generations") or (), checks, strict=False) if is_verified]
    return {"prompt": row["problem"], "answer": row["answer"], "demonstration": verified[0] if verified else None}


def _openthoughts_metadata(row: Row) -> Row:
    thought, solution = row["deepseek_reasoning"], row["deepseek_solution"]
    reference = row.get("ground_truth_solution")
    return {
        "prompt": row["problem"],
        "answer": (last_boxed(reference) or reference) if reference else None,
        "demonstration": f"<think>{thought}</think>{solution}",
    }


def _conversations(row: Row) -> Row:
    """A system column and turns of {from, value}; the demonstration is the assistant's turn at the end."""
    roles = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
    turns = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
    return _messages(turns, row.get("system"))


def _dolphin(row: Row) -> Row:
    """The answer is the last message, or is in columns of its own together with its reasoning."""
    turns = list(row["messages"])
    if row.get("reasoning") is not None and row.get("answer") is not None:
        response = f"<think>{row['reasoning']}</think>{row['answer']}"
        turns = [*(turn for turn in turns if turn["role"] != "assistant"), {"role": "assistant", "content": response}]
    return _messages(turns)


def _messages(turns: Sequence[Mapping[str, str]], system: str | None = None) -> Row:
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise ValueError("the conversation does not end with an answer")
    before = [{"role": "system", "content": system}] if system else []
    response = turns[-1]["content"]
    return {"prompt": [*before, *turns[:-1]], "answer": last_boxed(response), "demonstration": response}


def _r1_distill(row: Row) -> Row:
    """Version 1 of the data set has messages, version 0 has columns."""
    if "reannotated_messages" in row:
        return _messages(row["reannotated_messages"])
    reference = row.get("solution")
    return {
        "prompt": row["problem"],
        "answer": (last_boxed(reference) or reference) if reference else None,
        "demonstration": row["reannotated_assistant_content"],
    }


def _gsm8k(row: Row) -> Row:
    worked, mark, answer = row["answer"].partition("####")
    if not mark:
        raise ValueError("the answer has no ####")
    return {"prompt": row["question"], "answer": answer.strip(), "demonstration": worked.strip()}


def _countdown(row: Row) -> Row:
    numbers = [int(number) for number in row["nums"]]
    target = int(row["target"])
    prompt = COUNTDOWN_PROMPT.format(numbers=numbers, target=target)
    return {"prompt": prompt, "answer": str(target), "demonstration": None, "nums": numbers, "target": target}


def _knights_and_knaves(row: Row) -> Row:
    """With the column roles (name -> role) that the knights_and_knaves reward reads."""
    roles = dict(zip(row["names"], ["knight" if is_knight else "knave" for is_knight in row["solution"]], strict=True))
    return {"prompt": row["quiz"], "answer": row["solution_text"], "demonstration": None, "roles": roles}


def _verl(row: Row) -> Row:
    """Rows in verl's format: the prompt as messages, the answer in reward_model.ground_truth."""
    return {"prompt": list(row["prompt"]), "answer": str(row["reward_model"]["ground_truth"]), "demonstration": None}


def _problem_and_answer(row: Row) -> Row:
    return {"prompt": row["problem"], "answer": str(row["answer"]), "demonstration": row.get("solution")}


def _x_r1(row: Row) -> Row:
    answer = last_boxed(row["solution"]) or re.sub(r"^\$|\$$", "", row["solution"].strip())
    return {"prompt": row["problem"], "answer": answer, "demonstration": None}


SCHEMAS: Mapping[str, DatasetSchema] = {
    "openr1_math": DatasetSchema(sets=["open-r1/OpenR1-Math-220k"], licence="apache-2.0", read=_openr1_math),
    "openthoughts_metadata": DatasetSchema(
        sets=["open-thoughts/OpenThoughts-114k"], licence="apache-2.0", read=_openthoughts_metadata
    ),
    "conversations": DatasetSchema(sets=["bespokelabs/Bespoke-Stratos-17k"], licence="apache-2.0", read=_conversations),
    "messages": DatasetSchema(sets=["cognitivecomputations/dolphin-r1"], licence="apache-2.0", read=_dolphin),
    "r1_distill_sft": DatasetSchema(sets=["ServiceNow-AI/R1-Distill-SFT"], licence=NONCOMMERCIAL, read=_r1_distill),
    "gsm8k": DatasetSchema(sets=["openai/gsm8k"], licence="mit", read=_gsm8k),
    "countdown": DatasetSchema(sets=["Jiayi-Pan/Countdown-Tasks-3to4"], licence="see card", read=_countdown),
    "knights_and_knaves": DatasetSchema(
        sets=["K-and-K/knights-and-knaves"], licence=NONCOMMERCIAL, read=_knights_and_knaves
    ),
    "verl": DatasetSchema(
        sets=["hkust-nlp/SimpleRL-Zoo-Data", "BytedTsinghua-SIA/DAPO-Math-17k"], licence="see card", read=_verl
    ),
    "deepscaler": DatasetSchema(
        sets=["agentica-org/DeepScaleR-Preview-Dataset"], licence="mit", read=_problem_and_answer
    ),
    "x_r1": DatasetSchema(sets=["xiaodongguaAIGC/X-R1-750"], licence="see card", read=_x_r1),
}
