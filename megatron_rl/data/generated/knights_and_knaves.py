"""Knights and knaves: find who is a knight (always truthful) and who is a knave (always lies). Solutions are unique.

Source: the puzzles of Logic-RL, arXiv 2502.14768. Its data set is not for commercial use; these puzzles are generated.
"""

import random
from collections.abc import Callable, Sequence
from itertools import product

from megatron_rl.data.generated.base import Row, check_split, select_split
from megatron_rl.errors import DataError

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ivo", "June", "Kai", "Lena")
PROMPT = (
    "On an island everybody is either a knight, who always tells the truth, or a knave, who always lies. You meet "
    "{people}. {statements} Who is a knight and who is a knave? Think in <think> </think> tags, and answer in "
    "<answer> </answer> tags with a line for each, for example <answer> (1) Zoe is a knight\n"
    "(2) Ole is a knave </answer>."
)

Roles = tuple[bool, ...]
"""For each person, whether they are a knight."""
Claim = tuple[str, Callable[[Roles], bool]]
"""Text of a statement, and whether it holds under given roles."""


class KnightsAndKnaves:
    """Puzzles with ``num_people`` people."""

    def __init__(
        self, num_people: int = 3, num_train: int = 5000, num_test: int = 200, prompt: str = PROMPT, seed: int = 0
    ) -> None:
        """
        Args:
            prompt: template with the placeholders {people} and {statements}.
            seed: seed of the puzzles.
        """
        if not 2 <= num_people <= len(NAMES):
            raise DataError(f"knights_and_knaves num_people={num_people}: expected 2 to {len(NAMES)}.")
        self._num_people, self._prompt, self._seed = num_people, prompt, seed
        self._sizes = {"train": num_train, "test": num_test}

    def rows(self, split: str) -> list[Row]:
        check_split("knights_and_knaves", split)
        rng = random.Random(f"knights_and_knaves {self._num_people} {self._seed}")
        num_puzzles = sum(self._sizes.values())
        puzzles: dict[str, Row] = {}
        for _ in range(1000 * num_puzzles):
            if len(puzzles) == num_puzzles:
                break
            row = self._puzzle(rng)
            if row is not None:
                puzzles.setdefault(row["prompt"], row)
        if len(puzzles) < num_puzzles:
            raise DataError(
                f"knights_and_knaves found {len(puzzles)} of {num_puzzles} different puzzles of {self._num_people} "
                "people. Lower num_train or num_test, or raise num_people."
            )
        rows = list(puzzles.values())
        return select_split(rows, split, self._sizes["test"])

    def _puzzle(self, rng: random.Random) -> Row | None:
        """Return a random puzzle; None unless it has exactly one solution."""
        names = rng.sample(NAMES, self._num_people)
        claims = [random_claim(names, speaker, rng) for speaker in range(len(names))]
        all_roles = solutions([holds for _, holds in claims])
        if len(all_roles) != 1:
            return None
        lines = [
            f"({index}) {name} is a {role_name(is_knight)}"
            for index, (name, is_knight) in enumerate(zip(names, all_roles[0], strict=True), start=1)
        ]
        return {
            "prompt": self._prompt.format(
                people=f"{', '.join(names[:-1])} and {names[-1]}",
                statements=" ".join(f'{name} says: "{text}."' for name, (text, _) in zip(names, claims, strict=True)),
            ),
            "answer": "\n".join(lines),
            "demonstration": "<think></think>\n<answer>" + "\n".join(lines) + "</answer>",
            "roles": {name: role_name(is_knight) for name, is_knight in zip(names, all_roles[0], strict=True)},
            "num_people": self._num_people,
        }


def solutions(claims: Sequence[Callable[[Roles], bool]]) -> list[Roles]:
    """Return all roles under which the claims of all knights hold and those of no knave do."""
    every = product((False, True), repeat=len(claims))
    return [roles for roles in every if all(holds(roles) == roles[person] for person, holds in enumerate(claims))]


def random_claim(names: Sequence[str], speaker: int, rng: random.Random) -> Claim:
    """Return a random claim about other people; with two people, about both."""
    first, second = rng.sample([index for index in range(len(names)) if index != speaker or len(names) == 2], 2)
    (a, holds_a), (b, holds_b) = (_simple(names, index, rng) for index in (first, second))
    kind = rng.choice(("simple", "and", "or", "if", "iff"))
    match kind:
        case "and":
            return f"{a} and {b}", lambda roles: holds_a(roles) and holds_b(roles)
        case "or":
            return f"{a} or {b}", lambda roles: holds_a(roles) or holds_b(roles)
        case "if":
            return f"If {a} then {b}", lambda roles: not holds_a(roles) or holds_b(roles)
        case "iff":
            return f"{a} if and only if {b}", lambda roles: holds_a(roles) == holds_b(roles)
    return a, holds_a


def role_name(is_knight: bool) -> str:
    """The role in words."""
    return "knight" if is_knight else "knave"


def _simple(names: Sequence[str], index: int, rng: random.Random) -> Claim:
    claimed = rng.random() < 0.5
    return f"{names[index]} is a {role_name(claimed)}", lambda roles: roles[index] == claimed
