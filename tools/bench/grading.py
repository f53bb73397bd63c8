"""How many mathematical answers are graded in a second: python tools/bench/grading.py.

Ordinary answers are what models write most: whole and decimal numbers, fractions, some expressions that take
math-verify. The first repetition also starts sympy in every worker and is left out.
"""

import argparse
import statistics
import time

from megatron_rl.config.reward import RewardFunctionSection, RewardSection
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.rewards.types import RewardInput

# (said, reference): of ten answers eight are plain numbers
FORMS = (
    *(("{i}", "{i}"),) * 4,
    *(("{i}", "{j}"),) * 2,
    ("{i}.50", "{i}.5"),
    ("{i},000", "{i}000"),
    ("\\frac{{{i}}}{{7}}", "{i}/7"),
    ("x^2 + {i}x", "x(x + {i})"),
)


def samples(start: int, number: int) -> list[RewardInput]:
    """Different answers, each behind some steps."""
    found = []
    for i in range(start, start + number):
        value = 100 + i % 900
        said, answer = (text.format(i=value, j=value + 1) for text in FORMS[i % len(FORMS)])
        response = f"First we look at the problem. {'So it goes on. ' * 30}\\boxed{{{said}}}."
        found.append(
            RewardInput(prompt="", response=response, answer=answer, finish_reason="stop", num_tokens=99, seed=i)
        )
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Mathematical answers graded in a second.")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--answers", type=int, default=2000, help="in each repetition")
    parser.add_argument("--repetitions", type=int, default=5)
    asked = parser.parse_args()
    config = RewardSection(num_workers=asked.workers)
    pool = RewardPool(config, {"math": [RewardFunctionSection(name="math")]})
    rates = []
    for repetition in range(asked.repetitions + 1):
        given = samples(repetition * asked.answers, asked.answers)
        start = time.perf_counter()
        verdicts = [one for pending in [pool.submit("math", [sample]) for sample in given] for one in pending.result()]
        rates.append(asked.answers / (time.perf_counter() - start))
        wrong = sum(one.total == 0 for one in verdicts)
        assert all(one.status == "ok" for one in verdicts)
        assert wrong == asked.answers * 2 // 10, f"{wrong} are wrong"
    pool.close()
    kept = rates[1:]
    print(
        f"{statistics.mean(kept):.0f} ± {statistics.stdev(kept):.0f} answers per second on {asked.workers} workers "
        f"({len(kept)} repetitions of {asked.answers}; slowest {min(kept):.0f})"
    )


if __name__ == "__main__":
    main()
