"""Measure how many mathematical answers are graded per second: python tools/bench/grading.py.

The answers are of the kinds that models write most: whole and decimal numbers, fractions, and some expressions that
need math-verify. The first repetition is left out, because it also starts sympy in every worker.
"""

import argparse
import statistics
import time

from megatron_rl.config.reward import RewardFunctionSection, RewardSection
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.rewards.types import RewardInput

# (answer of the response, reference answer); eight of ten answers are plain numbers
FORMS = (
    *(("{i}", "{i}"),) * 4,
    *(("{i}", "{j}"),) * 2,
    ("{i}.50", "{i}.5"),
    ("{i},000", "{i}000"),
    ("\\frac{{{i}}}{{7}}", "{i}/7"),
    ("x^2 + {i}x", "x(x + {i})"),
)


def samples(start: int, number: int) -> list[RewardInput]:
    """``number`` responses with different answers, each after some steps of reasoning."""
    inputs = []
    for i in range(start, start + number):
        value = 100 + i % 900
        given, answer = (text.format(i=value, j=value + 1) for text in FORMS[i % len(FORMS)])
        response = f"First we look at the problem. {'So it goes on. ' * 30}\\boxed{{{given}}}."
        inputs.append(
            RewardInput(prompt="", response=response, answer=answer, finish_reason="stop", num_tokens=99, seed=i)
        )
    return inputs


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Measure how many mathematical answers are graded per second.")
    parser.add_argument("--workers", type=int, default=2, help="reward workers (2)")
    parser.add_argument("--answers", type=int, default=2000, help="answers of each repetition (2000)")
    parser.add_argument("--repetitions", type=int, default=5, help="measured repetitions (5)")
    args = parser.parse_args()
    config = RewardSection(num_workers=args.workers)
    pool = RewardPool(config, {"math": [RewardFunctionSection(name="math")]})
    rates = []
    for repetition in range(args.repetitions + 1):
        inputs = samples(repetition * args.answers, args.answers)
        start = time.perf_counter()
        results = [one for pending in [pool.submit("math", [sample]) for sample in inputs] for one in pending.result()]
        rates.append(args.answers / (time.perf_counter() - start))
        wrong = sum(one.total == 0 for one in results)
        assert all(one.status == "ok" for one in results)
        assert wrong == args.answers * 2 // 10, f"{wrong} answers are graded as wrong"
    pool.close()
    kept = rates[1:]
    print(
        f"{statistics.mean(kept):.0f} ± {statistics.stdev(kept):.0f} answers per second on {args.workers} workers "
        f"({len(kept)} repetitions of {args.answers}; slowest {min(kept):.0f})"
    )


if __name__ == "__main__":
    main()
