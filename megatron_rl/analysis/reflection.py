"""Detection of self-reflection in responses, by keywords and by an LLM judge. Pure functions.

Sources: keywords: understand-r1-zero (arXiv 2503.20783) and SimpleRL-Zoo (arXiv 2503.18892); categories of the LLM
judge: understand-r1-zero.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

POOLS: Mapping[str, Sequence[str]] = {
    "understand_r1_zero": (
        "recheck", "rethink", "reassess", "reevaluate", "re-evaluate", "reevaluation", "re-examine", "reexamine",
        "reconsider", "reanalyze", "double-check", "check again", "think again", "verify again", "go over the steps",
    ),
    "simplerl_zoo": ("recheck", "rethink", "try again", "wait", "alternatively", "retry", "however"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class JudgeRubric:
    """Prompt of an LLM judge and the categories that it can assign."""

    prompt: str
    """Template with {question} and {response}."""
    categories: Mapping[int, str]
    """Number in the judge's response -> name of the category."""
    max_new_tokens: int = 300


REFLECTION = JudgeRubric(
    prompt=(
        "Below are a question and a response to it. Sort the response into exactly one category.\n"
        "0: it has nothing to do with the question.\n"
        "1: it works on the question, without going back over its own steps.\n"
        "2: it works on the question, and at some place looks at its own steps again, doubts them or corrects them.\n"
        "3: it is nothing but a program.\n\n"
        "Question:\n{question}\n\nResponse:\n{response}\n\n"
        "Give a short reason, then end with a line 'Category: N'."
    ),
    categories={0: "off_topic", 1: "no_reflection", 2: "reflection", 3: "only_code"},
)
ANSWERING = JudgeRubric(
    prompt=(
        "Below are a question and a text that a model wrote behind it. Does the text try to answer the question (1), "
        "or does it go on with the question or with something else (0)?\n\n"
        "Question:\n{question}\n\nText:\n{response}\n\nEnd with a line 'Category: N', N being 0 or 1."
    ),
    categories={0: "continues", 1: "answers"},
    max_new_tokens=100,
)


def keywords_in(response: str, pool: str) -> list[str]:
    """Return the keywords of a pool that occur at the beginning of a word, in the pool's order; case-insensitive.

    Args:
        response: text to search.
        pool: a name in POOLS.
    """
    return [word for word in POOLS[pool] if re.search(rf"(?<!\w){re.escape(word)}", response, re.IGNORECASE)]


def category_of(judge_response: str, rubric: JudgeRubric) -> int | None:
    """Return the last number after "Category" in a judge's response; None if it is missing or not in the rubric."""
    found = re.findall(r"category\W{0,4}(\d+)", judge_response, re.IGNORECASE)
    category = int(found[-1]) if found else None
    return category if category in rubric.categories else None
