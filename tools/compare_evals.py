"""Compare finished evaluations: python tools/compare_evals.py BEFORE AFTER [AFTER …].

Each argument is a run.output_dir of python -m megatron_rl.evaluate. Prints the first one's share of right answers, and
of each of the others the difference at the same questions with its standard error; * marks what is no chance (95 %).
"""

import argparse
import sys
from pathlib import Path

from megatron_rl.analysis.study import markdown
from megatron_rl.errors import MegatronRLError
from megatron_rl.evaluation.compare import compared, read_finished


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Finished evaluations against the first one, question by question.")
    parser.add_argument("evaluations", nargs="+", type=Path, metavar="DIR")
    asked = parser.parse_args(arguments)
    if len(asked.evaluations) < 2:
        sys.exit("there is nothing to compare with: give two evaluations or more.")
    try:
        print(markdown(compared([read_finished(path) for path in asked.evaluations])))
    except MegatronRLError as error:
        sys.exit(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
