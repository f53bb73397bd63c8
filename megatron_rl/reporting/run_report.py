"""HTML report of a run from metrics.jsonl and samples.jsonl; one self-contained file."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader

from megatron_rl.config import RunConfig, dump_config
from megatron_rl.config.reward_training import RewardTrainingConfig
from megatron_rl.metrics.console import TIMINGS
from megatron_rl.metrics.sinks import read_rows
from megatron_rl.reporting.plots import Rows, line_plot, time_split_plot
from megatron_rl.run_folder import RunFolder, write_atomically

# metrics under val/ that are not shares of right answers
NOT_ACCURACY = (
    "val/score",
    "val/failures",
    "val/loss",
    "val/response_length/mean",
    "val/response_length/max",
    "val/response_length/min",
)


def write_report(config: RunConfig | RewardTrainingConfig) -> str:
    """Write the report of a run that ended or was stopped; return the last lines for the console."""
    folder = RunFolder(config.run.output_dir)
    rows = read_rows(folder.metrics) if folder.metrics.exists() else []
    if not rows:
        return "no report: no metrics have been written yet"
    write_atomically(folder.report, render(config, rows, read_rows(folder.samples) if folder.samples.exists() else []))
    lines = []
    for name, (first, last, step) in _held_out(rows).items():
        since = f", {last:.1%} after {step} steps" if step else ""
        lines.append(f"held-out {name.removeprefix('val/')}: {first:.1%} before{since}")
    return "\n".join([*lines, f"report: {folder.report}"])


def render(config: RunConfig | RewardTrainingConfig, rows: Rows, samples: Sequence[Mapping[str, Any]]) -> str:
    """Render the page.

    Args:
        config: of the run.
        rows: of metrics.jsonl.
        samples: rows of samples.jsonl.
    """
    accuracy = {name: name.removeprefix("val/") for name in _held_out(rows)}
    plots = [
        line_plot("Reward", rows, {"critic/score/mean": "reward"}),
        line_plot("Held-out accuracy", rows, accuracy, smooth=False),
        line_plot("Benchmarks", rows, _benchmarks(rows), smooth=False),
        line_plot("Response length (tokens)", rows, {"response_length/mean": "mean"}),
        line_plot("Entropy (nats per token)", rows, {"actor/entropy": "entropy"}),
        line_plot("KL", rows, {"actor/kl_loss": "to the reference", "actor/ppo_kl": "to the policy before the update"}),
        line_plot("Loss", rows, {"actor/loss": "loss"}),
        line_plot("Loss", rows, {"reward_model/loss": "training"}),
        line_plot("Accuracy", rows, {"reward_model/accuracy": "training"}),
        line_plot("Reward model score", rows, {"reward_model/score/mean": "mean"}),
        line_plot("Gradient norm", rows, {"actor/grad_norm": "policy", "reward_model/grad_norm": "reward model"}),
        line_plot(
            "Log-prob mismatch of trainer and engine (nats)",
            rows,
            {"train_rollout_logprob_abs_diff/mean": "mean absolute difference"},
        ),
        line_plot("Value loss", rows, {"critic/vf_loss": "loss"}),
        line_plot("Explained variance of the returns", rows, {"critic/vf_explained_var": "share"}),
        line_plot("Groups with equal rewards", rows, {"rollout/zero_std/fraction": "share of groups"}),
        time_split_plot("Step time by phase", rows, TIMINGS),
    ]
    environment = Environment(loader=PackageLoader("megatron_rl.reporting"), autoescape=True)
    return environment.get_template("run_report.html").render(
        title=config.run.name,
        num_steps=rows[-1]["step"],
        num_seconds=sum(row.get("timing_s/step") or 0.0 for row in rows),
        held_out=_held_out(rows),
        plots=[plot for plot in plots if plot],
        samples=_paired(samples),
        config=dump_config(config),
    )


def _held_out(rows: Rows) -> dict[str, tuple[float, float, int]]:
    """Return validation metric -> first value, last value, step of the last value."""
    values = {}
    for name in sorted({name for row in rows for name in row if name.startswith("val/")} - set(NOT_ACCURACY)):
        with_value = [row for row in rows if row.get(name) is not None]
        values[name] = (with_value[0][name], with_value[-1][name], with_value[-1]["step"])
    return values


def _benchmarks(rows: Rows) -> dict[str, str]:
    """Return the avg@k metric of each benchmark -> its label in the plot."""
    names = sorted({name for row in rows for name in row if name.startswith("benchmark/") and "/avg@" in name})
    return {name: name.removeprefix("benchmark/").replace("/avg@", ", avg@") for name in names}


def _paired(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return each prompt with its first and its last sample."""
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_prompt.setdefault(sample["prompt"], []).append(sample)
    return [{"prompt": prompt, "before": group[0], "after": group[-1]} for prompt, group in by_prompt.items()]
