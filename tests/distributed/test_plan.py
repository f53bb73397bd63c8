"""Planned memory against the memory that a run uses."""

from pathlib import Path

import pytest

from tests import forked
from tools.bench.plan import CASES, Case, measured_mb, planned_mb, write_models

MEASURED = [
    case
    for case in CASES
    if case.title not in ("micro-batches of one sequence", "norms and feed-forward blocks recomputed")
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    write_models(folder)
    return folder


@pytest.mark.parametrize("case", MEASURED, ids=lambda case: case.title)
def test_planned_memory_is_within_15_percent_of_measured(case: Case, models: Path) -> None:
    planned, measured = planned_mb(models, case), measured_mb(models, case, forked.run)
    assert planned == pytest.approx(measured, rel=0.15)
