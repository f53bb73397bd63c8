"""Who may import whom: DESIGN's table, read off the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_rl"
BASE = {"errors", "types", "config", "plugins"}
# room -> rooms it may import besides itself
ALLOWED = {
    "errors": set(),
    "types": set(),
    "config": {"errors"},
    "plugins": {"errors"},
    "algorithms": BASE,
    "rewards": BASE | {"sandbox"},
    "sandbox": {"errors"},
    "tasks": BASE,
    "data": BASE | {"tasks", "rewards"},
    "metrics": BASE,
    "batching": BASE | {"algorithms"},
    "models": {"errors", "types", "weights"},
    "weights": {"errors", "types"},
    "collective": {"errors", "types"},
    "cpu_linear": set(),
    "environments": BASE,
    "rollout": BASE
    | {"data", "rewards", "environments", "metrics", "algorithms", "models", "weights", "collective", "cpu_linear"},
    "mcore": BASE | {"algorithms", "batching", "metrics", "models", "weights", "collective", "cpu_linear"},
    "weight_sync": BASE | {"mcore", "models", "weights", "rollout", "batching", "metrics", "collective"},
    "analysis": BASE | {"rollout", "data", "tasks", "rewards", "metrics", "run_folder"},
    "evaluation": BASE
    | {
        "rollout",
        "data",
        "tasks",
        "rewards",
        "models",
        "weights",
        "collective",
        "run_folder",
        "analysis",
        "conversion",
    },
    "curation": BASE | {"data", "analysis", "evaluation", "rollout"},
    "planning": BASE | {"models", "weights", "algorithms"},
    "run_folder": {"errors", "config"},
    "integrity": {"errors"},
    "conversion": {"errors", "models", "weights", "collective"},
}
EVERYTHING = {
    "continuation",
    "examiner",
    "fallback",
    "forecast",
    "heartbeat",
    "learning",
    "ledger",
    "run_models",
    "valuation",
    "correction",
    "credit",
    "doctor",
    "drift",
    "profiling",
    "loop",
    "build",
    "train",
    "evaluate",
    "command",
    "cadence",
    "judging",
    "reward_training",
    "train_reward_model",
    "checkpoints",
    "run_log",
    "dry_run",
    "step_metrics",
    "stop",
}
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
NO_TORCH = {"config", "errors", "plugins", "rewards", "sandbox", "tasks", "run_folder", "integrity"}

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
    room = room_of(path)
    for name in imports_of(path):
        top, *rest = name.split(".")
        if top == "megatron_rl" and rest and room not in EVERYTHING and room != "__init__":
            assert rest[0] in ALLOWED[room] | {room}, f"{room} imports {name}"
        assert top not in ONLY_IN or room in ONLY_IN[top], f"{room} imports {name}"
        assert not (top == "torch" and room in NO_TORCH), f"{room} imports torch"
        assert not name.startswith("megatron.training"), f"{path} imports megatron.training"


def test_the_table_knows_every_room() -> None:
    assert {room_of(path) for path in FILES} - {"__init__"} == set(ALLOWED) | EVERYTHING


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500
