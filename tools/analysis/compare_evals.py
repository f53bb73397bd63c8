"""Compare finished evaluations: python tools/analysis/compare_evals.py BEFORE AFTER [AFTER …] [--html FILE].

Each argument is a run.output_dir of python -m megatron_rl.evaluate. Prints the first one's share of right answers, and
of each of the others the difference at the same questions with its standard error; * marks what is no chance (95 %).
"""

import argparse
import sys
from pathlib import Path

from megatron_rl.errors import MegatronRLError
from megatron_rl.evaluation.compare import compared, read_all_finished
from megatron_rl.evaluation.compare_html import render_comparison
from megatron_rl.reporting.study import markdown
from megatron_rl.run_folder import write_atomically


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Finished evaluations against the first one, question by question.")
    parser.add_argument("evaluations", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with plots and changed questions")
    asked = parser.parse_args(arguments)
    if len(asked.evaluations) < 2:
        sys.exit("there is nothing to compare with: give two evaluations or more.")
    try:
        runs = read_all_finished(asked.evaluations)
        print("\n".join(f"{run.name}: {run.results['model']}" for run in runs), end="\n\n")
        print(markdown(compared(runs)))
        if asked.html is not None:
            write_atomically(asked.html, render_comparison(runs))
            print(f"page: {asked.html}")
    except MegatronRLError as error:
        sys.exit(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
