"""Metrics: reduction over ranks, files, console output and the run report."""

import json
from math import nan
from pathlib import Path

import pytest

from megatron_rl.config import load_config
from megatron_rl.metrics.console import PlainConsole
from megatron_rl.metrics.metric import EffectiveShare, Largest, Max, Mean, Min, Sum, mean_max_min, merge, results
from megatron_rl.metrics.sinks import JsonlSink, read_rows
from megatron_rl.reporting.run_report import write_report
from tests.toys import write_config


def test_each_kind_of_metric_has_its_own_reduction() -> None:
    ranks = [
        {"mean": Mean(3.0, 1), "sum": Sum(1), "max": Max(1.0), "min": Min(1.0)},
        {"mean": Mean(3.0, 2), "sum": Sum(2), "max": Max(5.0), "min": Min(5.0), "only here": Sum(7)},
    ]
    assert results(merge(ranks)) == {"mean": 2.0, "sum": 3, "max": 5.0, "min": 1.0, "only here": 7}
    assert results(mean_max_min("x", [1.0, 2.0, 6.0])) == {"x/mean": 3.0, "x/max": 6.0, "x/min": 1.0}
    assert mean_max_min("x", []) == {}
    weights = [EffectiveShare(3.0, 5.0, 2), EffectiveShare(1.0, 1.0, 1)]  # weights 1 and 2; weight 1
    assert results(merge([{"ess": one} for one in weights])) == {"ess": pytest.approx(16 / (3 * 6))}
    largest = [Largest(((3.0, "c"), (1.0, "a"))), Largest(((4.0, "d"), (3.0, "c"), (2.0, "b"))), Largest(((nan, "e"),))]
    assert largest[0].merge(largest[1]) == largest[1].merge(largest[0]) == Largest(((4.0, "d"), (3.0, "c"), (2.0, "b")))
    assert [label for _, label in largest[1].merge(largest[2]).entries] == ["e", "d", "c"]
    with pytest.raises(AssertionError, match="x is both Mean and Sum"):
        merge([{"x": Mean(1.0)}, {"x": Sum(1)}])


def test_jsonl_moves_rows_after_the_resumed_step_to_another_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, resumed_step=0)
    for step in range(1, 5):
        sink.write(step, {"a": float(step), "broken": float("inf")})
    sink.close()
    with path.open("a") as file:
        file.write('{"step": 5, "a"')  # as left by a process that was killed
    again = JsonlSink(path, resumed_step=2)
    again.write(3, {"a": 30.0})
    again.close()
    assert [(row["step"], row["a"]) for row in read_rows(path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert read_rows(path)[0]["broken"] is None
    assert [row["step"] for row in read_rows(tmp_path / "metrics.discarded.jsonl")] == [3, 4]


def test_plain_console_prints_the_available_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    console = PlainConsole("name", 10, every=5)
    for step in range(11):
        console.step(step, {"critic/score/mean": 0.5, "timing_s/step": 0.25})
    assert capsys.readouterr().out.splitlines() == [
        "name  step  5/10  reward 0.500  s/step 0.25",
        "name  step 10/10  reward 0.500  s/step 0.25",
    ]


def test_a_report_escapes_responses_and_is_summarised_in_the_log(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, tmp_path / "model"))
    assert write_report(config) == "no report: no metrics have been written yet"
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"step": 0, "val/right": 0.25}, {"step": 1, "critic/score/mean": 0.1}, {"step": 2, "val/right": 0.75}]
    (run / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert write_report(config).splitlines()[0] == "held-out right: 25.0% before"
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {"step": 0, "prompt": "p", "response": "<script>x</script>", "answer": None, "reward": 0.0}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    assert write_report(config).splitlines() == [
        "held-out right: 25.0% before, 75.0% after 2 steps",
        f"report: {run / 'report.html'}",
    ]
    page = (run / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
