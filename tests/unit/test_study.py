"""Tables and plots of the curves of several runs, and the tool that launches the runs."""

import sys
from pathlib import Path

import pytest

from megatron_rl.errors import DataError
from megatron_rl.reporting.study import curve_of, curve_table, markdown, render_study
from tests import forked
from tests.toys import write_config

ROOT = Path(__file__).parents[2]
CURVES = {"GRPO": [{0: 0.25, 10: 0.5, 20: 0.75}, {0: 0.25, 10: 0.7}], "A & B": [{0: 0.25, 10: 0.1}, {0: 0.25, 10: 0.3}]}


def test_the_table_has_the_steps_that_all_runs_have() -> None:
    rows = curve_table("run", CURVES)
    assert rows == [
        ["run", "step 0", "step 10"],
        ["GRPO", "25.0% ± 0.0%", "60.0% ± 14.1%"],
        ["A & B", "25.0% ± 0.0%", "20.0% ± 14.1%"],
    ]
    assert markdown(rows).splitlines()[1] == "| --- | --- | --- |"
    assert curve_table("run", {"x": [{0: -1.5}]})[1] == ["x", "-1.5"]


def test_the_page_has_every_run() -> None:
    page = render_study("a study", "val/exact_match", CURVES)
    assert page.count("<svg") == 1
    assert "A &amp; B" in page


def test_a_missing_metric_is_reported_with_similar_ones() -> None:
    rows = [{"step": 0, "val/exact_match": 0.5}, {"step": 1, "val/exact_match": None}]
    assert curve_of(rows, "val/exact_match") == {0: 0.5}
    with pytest.raises(DataError, match=r"no row has val/f1\. Similar metrics: val/exact_match"):
        curve_of(rows, "val/f1")


def test_the_tool_launches_the_runs_and_compares_them(toy_model, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    config = write_config(tmp_path, toy_model("qwen2"))
    study = tmp_path / "toys.yaml"
    study.write_text(
        f"metric: critic/score/mean\nseeds: [0, 1]\noverrides: [run.num_steps=1]\n"
        f"runs: {{GRPO: {{config: {config}}}, RLOO: {{config: {config}, overrides: [algorithm.advantage=rloo]}}}}\n"
    )
    command = [
        sys.executable,
        "tools/analysis/ablate.py",
        str(study),
        "--seeds",
        "3",
        "--folder",
        str(tmp_path / "runs"),
    ]
    done = forked.run(command)
    assert done.returncode == 0, done.stderr
    assert [line.split(" | ")[0] for line in done.stdout.splitlines()[:4]] == ["| run", "| ---", "| GRPO", "| RLOO"]
    assert "RLOO" in (tmp_path / "runs" / "report.html").read_text()
    resolved = (tmp_path / "runs" / "RLOO" / "seed_3" / "config.yaml").read_text()
    assert "advantage: rloo" in resolved
    assert "seed: 3" in resolved
    unknown_run = forked.run([*command, "--only", "PPO"])
    assert unknown_run.returncode == 1
    assert "has no run 'PPO'. It has: GRPO, RLOO." in unknown_run.stderr
