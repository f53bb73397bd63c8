"""Who may import whom: DESIGN's table, read off the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_rl"
BASE = {"errors", "types", "config"}
# room -> rooms it may import besides itself; a room is a folder or module at the top of the package
ALLOWED = {
    "errors": set(),
    "types": set(),
    "config": {"errors"},
    "cli": {"errors"},
    "run_folder": {"errors", "config"},
    "sandbox": {"errors"},
    "metrics": {"errors"},
    "weights": {"errors", "types"},
    "models": {"errors", "types", "weights"},
    "distributed": BASE,
    "algorithms": BASE,
    "batching": BASE | {"algorithms"},
    "rewards": BASE | {"sandbox"},
    "data": BASE | {"rewards"},
    "environments": BASE,
    "rollout": BASE | {"data", "rewards", "environments", "metrics", "models", "weights", "distributed"},
    "mcore": BASE | {"algorithms", "batching", "metrics", "models", "weights", "distributed"},
    "weight_sync": BASE | {"mcore", "models", "weights", "rollout", "batching", "metrics", "distributed"},
    "planning": BASE | {"models", "weights", "algorithms", "distributed"},
    "conversion": {"errors", "models", "weights", "distributed"},
    "checkpointing": BASE | {"mcore", "models", "weights", "rollout", "metrics", "distributed", "run_folder"},
    "reporting": BASE | {"metrics", "run_folder"},
    "evaluation": BASE
    | {"rollout", "data", "rewards", "models", "weights", "metrics", "distributed", "run_folder", "reporting"},
    "analysis": BASE | {"rollout", "evaluation", "reporting"},
    "curation": BASE | {"algorithms", "cli", "data", "rewards", "rollout", "evaluation", "reporting"},
}
EVERYTHING = {"train", "evaluate", "train_reward_model", "trainer", "doctor"}
ONLY_IN = {
    "megatron": {"mcore"},
    "transformer_engine": {"mcore"},
    "apex": {"mcore"},
    "vllm": {"rollout"},
    "sglang": {"rollout"},
    "wandb": {"metrics"},
    "tensorboard": {"metrics"},
    "omegaconf": {"config"},
    "math_verify": {"rewards"},
}
# rooms, and parts of rooms, that import no torch: they run in processes that start often
NO_TORCH = ("errors", "config", "cli", "run_folder", "sandbox", "rewards", "data/generated")

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_keep_the_layers(path: Path) -> None:
    room, inside = room_of(path), str(path.relative_to(PACKAGE))
    for name in imports_of(path):
        top, *rest = name.split(".")
        if top == "megatron_rl" and rest and room not in EVERYTHING and room != "__init__":
            assert rest[0] in ALLOWED[room] | {room}, f"{room} imports {name}"
        assert top not in ONLY_IN or room in ONLY_IN[top], f"{room} imports {name}"
        assert not (top == "torch" and inside.startswith(NO_TORCH)), f"{inside} imports torch"
        assert not name.startswith("megatron.training"), f"{path} imports megatron.training"


def test_the_table_knows_every_room() -> None:
    assert {room_of(path) for path in FILES} - {"__init__"} == set(ALLOWED) | EVERYTHING


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450


def test_no_room_imports_itself_through_others() -> None:
    """The table has no circle: every room can be put behind all that it imports."""
    order: list[str] = []
    rest = dict(ALLOWED)
    while rest:
        free = [room for room, wanted in rest.items() if wanted <= set(order)]
        assert free, f"a circle among {sorted(rest)}"
        order += free
        rest = {room: wanted for room, wanted in rest.items() if room not in free}


def test_the_house_is_small_at_the_top() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 8
    lengths = sorted(len(path.read_text().splitlines()) for path in FILES)
    assert lengths[len(lengths) // 2] < 130
    assert len((PACKAGE / "trainer/loop.py").read_text().splitlines()) <= 150
