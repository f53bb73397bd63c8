"""Write the published examples of BIG-Bench Hard as rows: python tools/data/bbh_examples.py cot-prompts OUTPUT.jsonl.

The first argument is the folder cot-prompts of https://github.com/suzgunmirac/BIG-Bench-Hard: SUBSET.txt with a notice,
a line of dashes, a description of the subset, and three questions with worked answers. Each question becomes a row with
the columns subset, description, input and worked, for examples.bbh_3shot of an evaluation.
"""

import argparse
import re
import sys
from pathlib import Path

from megatron_rl.errors import DataError
from megatron_rl.rollout.serialization import write_lines

BEFORE_ANSWER = "A: Let's think step by step.\n"


def main(argv: list[str] | None = None) -> int:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Write the published examples of BIG-Bench Hard as rows.")
    parser.add_argument("folder", type=Path, help="folder cot-prompts of BIG-Bench-Hard")
    parser.add_argument("output", type=Path, help="JSONL file to write")
    args = parser.parse_args(argv)
    try:
        files = sorted(args.folder.glob("*.txt"))
        if not files:
            raise DataError(f"{args.folder} has no *.txt. Give the folder cot-prompts of BIG-Bench-Hard.")
        rows = [row for file in files for row in examples_in(file)]
        write_lines(args.output, rows)
    except DataError as error:
        sys.exit(f"error: {error}")
    print(f"{len(rows)} examples of {len(files)} subsets: {args.output}")
    return 0


def examples_in(file: Path) -> list[dict[str, str]]:
    """Rows of the examples of a subset.

    Raises:
        DataError: the file does not have the published format.
    """
    text = re.sub(r"\A.*?^-+\n", "", file.read_text(encoding="utf-8"), count=1, flags=re.DOTALL | re.MULTILINE)
    description, *questions = re.split(r"^Q: ", text, flags=re.MULTILINE)
    rows = []
    for question in questions:
        text, mark, worked = question.partition(BEFORE_ANSWER)
        if not mark:
            raise DataError(f"{file}: a question has no line {BEFORE_ANSWER.strip()!r}, unlike the published file.")
        rows.append(
            {
                "subset": file.stem,
                "description": description.strip(),
                "input": text.removesuffix("\n"),
                "worked": worked.strip("\n"),
            }
        )
    if not rows:
        raise DataError(f"{file} has no line that begins with 'Q: ', unlike the published file.")
    return rows


if __name__ == "__main__":
    sys.exit(main())
