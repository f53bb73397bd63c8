"""Compare finished evaluations: python tools/analysis/compare_evals.py BEFORE AFTER [AFTER …] [--html FILE].

Each argument is a run.output_dir of python -m megatron_rl.evaluate. Prints the accuracy of the first evaluation and,
for each other one, its paired difference from the first over the same questions with its standard error; * marks a
difference that is significant (95 %).
"""

import argparse
import sys
from pathlib import Path

from megatron_rl.errors import MegatronRLError
from megatron_rl.evaluation.compare import comparison_table, read_all_finished
from megatron_rl.evaluation.compare_html import render_comparison
from megatron_rl.reporting.study import markdown
from megatron_rl.run_folder import write_atomically


def main(argv: list[str] | None = None) -> int:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(
        description="Compare finished evaluations with the first one, question by question."
    )
    parser.add_argument("evaluations", nargs="+", type=Path, metavar="DIR", help="run.output_dir of an evaluation")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="also write a page with plots and the questions whose result changed"
    )
    args = parser.parse_args(argv)
    if len(args.evaluations) < 2:
        sys.exit("one evaluation cannot be compared: give two or more.")
    try:
        runs = read_all_finished(args.evaluations)
        print("\n".join(f"{run.name}: {run.results['model']}" for run in runs), end="\n\n")
        print(markdown(comparison_table(runs)))
        if args.html is not None:
            write_atomically(args.html, render_comparison(runs))
            print(f"page: {args.html}")
    except MegatronRLError as error:
        sys.exit(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
