"""The published examples of BIG-Bench Hard as rows: python tools/data/bbh_examples.py cot-prompts OUTPUT.jsonl.

The first argument is the folder cot-prompts of https://github.com/suzgunmirac/BIG-Bench-Hard: SUBSET.txt with a notice,
a line of dashes, what the subset is about, and three questions with worked answers. Each becomes a row with the
columns subset, description, input and worked, for examples.bbh_3shot of an evaluation.
"""

import argparse
import re
import sys
from pathlib import Path

from megatron_rl.errors import DataError
from megatron_rl.rollout.serialization import write_lines

BEFORE_ANSWER = "A: Let's think step by step.\n"


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="The published examples of BIG-Bench Hard as rows.")
    parser.add_argument("folder", type=Path, help="cot-prompts")
    parser.add_argument("output", type=Path, help="JSONL file to write")
    asked = parser.parse_args(arguments)
    try:
        files = sorted(asked.folder.glob("*.txt"))
        if not files:
            raise DataError(f"{asked.folder} has no *.txt. Give the folder cot-prompts of BIG-Bench-Hard.")
        rows = [row for file in files for row in examples_in(file)]
        write_lines(asked.output, rows)
    except DataError as error:
        sys.exit(f"error: {error}")
    print(f"{len(rows)} examples of {len(files)} subsets: {asked.output}")
    return 0


def examples_in(file: Path) -> list[dict[str, str]]:
    """The examples of a subset.

    Raises:
        DataError: it is not written as the published ones are.
    """
    text = re.sub(r"\A.*?^-+\n", "", file.read_text(encoding="utf-8"), count=1, flags=re.DOTALL | re.MULTILINE)
    description, *questions = re.split(r"^Q: ", text, flags=re.MULTILINE)
    rows = []
    for question in questions:
        asked, mark, worked = question.partition(BEFORE_ANSWER)
        if not mark:
            raise DataError(f"{file}: a question has no line {BEFORE_ANSWER.strip()!r}. It is not as published.")
        rows.append(
            {
                "subset": file.stem,
                "description": description.strip(),
                "input": asked.removesuffix("\n"),
                "worked": worked.strip("\n"),
            }
        )
    if not rows:
        raise DataError(f"{file} has no line that begins with 'Q: '. It is not as published.")
    return rows


if __name__ == "__main__":
    sys.exit(main())
