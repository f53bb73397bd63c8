"""The training command: its output, the configurations that it rejects, and the files that it writes."""

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

import megatron_rl.mcore  # noqa: F401  prepares Megatron-Core for the CPU
from megatron_rl.checkpointing.resume import check_same_run, flatten_plain
from megatron_rl.config import load_config
from megatron_rl.errors import ConfigError
from megatron_rl.train import main
from tests.toys import write_config

from megatron.core.dist_checkpointing.strategies import filesystem_async  # isort: skip


@pytest.fixture
def model(toy_model: Callable[..., Path], tmp_path: Path) -> Path:
    """Return a copy of a model, which a test may damage."""
    return Path(shutil.copytree(toy_model("qwen2"), tmp_path / "model"))


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path, model)


def start(config: Path, *arguments: str) -> int:
    return main(["--config", str(config), *arguments])


def single_error(capsys: pytest.CaptureFixture[str], status: int) -> str:
    """Return the message of a start that failed with a single error."""
    error = capsys.readouterr().err
    assert status == 1
    messages = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, error
    assert "Traceback" not in error
    return messages[0]


def test_dry_run_prints_the_config_and_writes_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(config, "--dry-run", "optimizer.lr=2e-5") == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["optimizer"]["lr"] == 2e-5
    assert "# ok: 1 ranks, 64 training prompts (0 over-long dropped), 8 held-out prompts, begins at step 0" in printed
    assert not (tmp_path / "run").exists()


def test_a_run_writes_metrics_samples_checkpoint_and_report(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "metrics.console=plain",
        "metrics.tensorboard=true",
        "metrics.wandb=offline",
        "checkpoint.save_hf=true",
        "checkpoint.in_background=true",
        "profiling.steps=[2]",
        "profiling.peak_tflops=0.1",
        "memory.offload=[grads,optimizer]",
    ]
    assert start(config, *arguments) == 0
    printed = capsys.readouterr().out
    assert "each step: 4 prompts x 4 = 16 sequences; mini-batches of 8 sequences; 2 optimizer updates" in printed
    assert "step 3/3" in printed
    last = printed.strip().splitlines()[-2:]
    assert "before" in last[0]
    assert "after 3 steps" in last[0]
    assert last[1] == f"report: {tmp_path / 'run' / 'report.html'}"
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    expected = [
        "actor/pg_loss",
        "actor/pg_clipfrac",
        "actor/ppo_kl",
        "actor/kl_loss",
        "actor/entropy",
        "actor/grad_norm",
        "actor/lr",
        "critic/score/mean",
        "critic/rewards/max",
        "critic/advantages/min",
        "response_length/mean",
        "response_length/clip_ratio",
        "prompt_length/mean",
        "timing_s/gen",
        "timing_s/old_log_prob",
        "timing_s/ref",
        "timing_s/update_actor",
        "timing_s/step",
        "perf/throughput",
        "perf/total_num_tokens",
        "train_rollout_logprob_abs_diff/mean",
        "rollout/zero_std/count",
        "rollout/reward_error/count",
        "rollout/reward_timeout/count",
        "batch/imbalance/max",
        "batch/num_micro_batches",
        "perf/tflops_per_rank/actor",
        "perf/mfu/actor",
        "timing_s/offload",
        "timing_s/onload",
    ]
    assert set(expected) <= set(rows[1])
    # before the first update the log-probs of trainer and engine agree
    assert rows[1]["train_rollout_logprob_abs_diff/max"] < 1e-4
    timeline = json.loads((run / "profile/step_2_rank_0.json").read_text())
    assert {"gen", "update_actor"} <= {event["name"] for event in timeline["traceEvents"]}
    assert "update_actor" in (run / "profile/step_2_rank_0.txt").read_text()
    assert len(list((run / "profile").iterdir())) == 2
    assert list(run.glob("tensorboard/events*"))
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    page = (run / "report.html").read_text()
    assert page.count("<svg") >= 8
    assert "Sample rollouts before and after" in page
    assert "src=" not in page
    exported = run / "checkpoints" / "step_000003" / "hf"
    assert start(config, f"model.path={exported}", f"run.output_dir={tmp_path}/second", "run.num_steps=1") == 0


class TestRejectedInputs:
    """Every invalid input gives one message, a non-zero exit status and no run folder."""

    @pytest.fixture(autouse=True)
    def _no_run_folder(self, tmp_path: Path) -> Iterator[None]:
        yield
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["rollout.group_sise=4"], "Did you mean rollout.group_size"),
            (["batching.num_mini_batches=3"], "are not divisible by batching.num_mini_batches=3"),
            (
                ["rollout.group_size=1"],
                "algorithm.advantage=grpo compares samples of one prompt",
            ),
            (["parallel.tensor_parallel_size=2"], "world size 1 is not divisible"),
            (["parallel.context_parallel_size=2"], "x parallel.context_parallel_size=2 = 2"),
            (["parallel.expert_parallel_size=2"], "parallel.expert_parallel_size=2"),
            (["parallel.virtual_pipeline_parallel_size=2"], "expected 1, or parallel.pipeline_parallel_size above 1"),
            (["moe.aux_loss=sequence"], "Set batching.packed=false"),
            (["precision.fp8=delayed"], "precision.fp8=delayed: expected Transformer Engine"),
            (["precision.fp8=delayed", "precision.bf16_first_layers=1"], "whose scales are shared by all layers"),
            (["profiling.memory_snapshot=true"], "profiling.memory_snapshot=true needs a GPU"),
            (["model.path=nowhere"], "nowhere"),
            (["data.train.path=no_such_task"], "expected one of arithmetic, countdown, hasty_addition"),
            (["data.max_prompt_tokens=2"], "longer than data.max_prompt_tokens=2"),
            (["data.on_overlong_prompt=error", "data.max_prompt_tokens=5"], "prompt 0 of hasty_addition has 6 tokens"),
            (["run.output_dir=/proc/nothing/run"], "run.output_dir=/proc/nothing/run: No such file"),
            (["run.output_dir=/dev/null/run"], "/dev/null is not a writable folder"),
            (["reward.functions=[{name: no_such}]"], "expected one of exact_match"),
            (["rollout.max_new_tokens=510", "data.max_prompt_tokens=600"], "more than the model's 512 positions"),
            (["--resume", "no/such/folder"], "no checkpoint there"),
        ],
    )
    def test_invalid_arguments(
        self, overrides: list[str], message: str, config: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert message in single_error(capsys, start(config, *overrides))

    def test_world_size(
        self, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "3")):
            monkeypatch.setenv(name, value)
        error = single_error(capsys, start(config, "--dry-run", "parallel.pipeline_parallel_size=2"))
        assert "world size 3 is not divisible" in error
        monkeypatch.delenv("LOCAL_RANK")
        assert "'LOCAL_RANK' is not set" in single_error(capsys, start(config, "--dry-run"))

    def test_layers_that_do_not_divide(
        self, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "3")):
            monkeypatch.setenv(name, value)
        error = single_error(capsys, start(config, "--dry-run", "parallel.pipeline_parallel_size=3"))
        assert "parallel.pipeline_parallel_size=3 does not divide the model's 2 layers" in error

    def test_missing_weights(self, config: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (model / "model.safetensors").unlink()
        assert "neither model.safetensors nor" in single_error(capsys, start(config))

    def test_truncated_weights(self, config: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
        assert "is truncated" in single_error(capsys, start(config))

    def test_a_missing_tensor(self, config: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tensors = load_file(model / "model.safetensors")
        del tensors["model.layers.0.mlp.up_proj.weight"]
        save_file(tensors, model / "model.safetensors")
        assert "first model.layers.0.mlp.up_proj.weight" in single_error(capsys, start(config))

    def test_unsupported_architecture(self, config: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        description = json.loads((model / "config.json").read_text()) | {"architectures": ["MambaForCausalLM"]}
        (model / "config.json").write_text(json.dumps(description))
        assert "MambaForCausalLM is not supported" in single_error(capsys, start(config))

    def test_tokenizer_without_an_end(self, config: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = model / "tokenizer_config.json"
        description = json.loads(path.read_text())
        del description["eos_token"]
        path.write_text(json.dumps(description))
        assert "has no end-of-sequence token" in single_error(capsys, start(config))

    def test_empty_data(self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "empty.jsonl").touch()
        error = single_error(capsys, start(config, "data.train.kind=jsonl", f"data.train.path={tmp_path}/empty.jsonl"))
        assert "has no rows" in error


def test_a_reward_that_raises_stops_the_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = single_error(capsys, start(config, "reward.functions=[{name: 'tests.own_rewards:raises'}]"))
    assert "8 of 8 rewards failed, more than reward.max_failure_fraction=0.1" in error
    assert "ZeroDivisionError: this reward is broken" in error


def test_auto_resume_rejects_another_config_and_resume_never_rejects_a_used_folder(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(config, "run.num_steps=1") == 0
    capsys.readouterr()
    error = single_error(capsys, start(config, "optimizer.lr=0.5"))
    assert "optimizer.lr: 0.001 in the checkpoint, 0.5 now" in error
    assert "holds a run already" in single_error(capsys, start(config, "--resume", "never"))
    # number of steps, evaluation, checkpoints and micro-batches may differ
    assert start(config, "run.num_steps=2", "batching.micro_batch_size=1", "validation.num_prompts=4") == 0
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_000002"
    assert start(config, "run.num_steps=3", "--resume", str(tmp_path / "run/checkpoints/step_000001")) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    discarded = (tmp_path / "run/metrics.discarded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in discarded] == [2]


def test_resume_tolerates_a_missing_or_half_replaced_latest_checkpoint(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints, plain = tmp_path / "run/checkpoints", "metrics.console=plain"
    assert start(config, "run.num_steps=3", "checkpoint.every=1") == 0
    (checkpoints / "step_000003/trainer.json").unlink()
    capsys.readouterr()
    assert start(config, "run.num_steps=4", "checkpoint.every=1", plain) == 0
    printed = capsys.readouterr().out
    assert "CHECKPOINT step_000003 IS DAMAGED and was passed over" in printed
    assert "resumed from step_000002" in printed
    shutil.rmtree(checkpoints / "step_000004")
    assert start(config, "run.num_steps=5", "checkpoint.every=1", plain) == 0
    printed = capsys.readouterr().out
    assert "CHECKPOINT step_000004 IS DAMAGED" in printed
    assert "resumed from step_000003" in printed
    # killed between the two renames of a replacement
    (checkpoints / "step_000005").rename(checkpoints / "step_000005.replaced")
    assert start(config, "run.num_steps=6", "checkpoint.every=1", plain) == 0
    printed = capsys.readouterr().out
    assert "DAMAGED" not in printed
    assert "resumed from step_000005" in printed
    assert [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()] == [
        *range(7)
    ]


def test_a_replaced_checkpoint_does_not_keep_its_export(config: Path, tmp_path: Path) -> None:
    """The replaced checkpoint has an export, the new one has none."""
    checkpoints, every = tmp_path / "run/checkpoints", "checkpoint.every=1"
    assert start(config, "run.num_steps=2", every, "checkpoint.save_hf=true") == 0
    assert (checkpoints / "step_000002/hf").exists()
    assert start(config, "run.num_steps=2", every, "--resume", str(checkpoints / "step_000001")) == 0
    assert not (checkpoints / "step_000002/hf").exists()


def test_config_keys_that_a_checkpoint_lacks_count_as_defaults(config: Path) -> None:
    current = flatten_plain(load_config(config))
    older = {key: value for key, value in current.items() if key != "algorithm.pass_k"}
    check_same_run(older, current, Path("a checkpoint"))
    with pytest.raises(ConfigError, match=r"algorithm\.pass_k: 4 in the checkpoint, 7 now"):
        check_same_run(older, current | {"algorithm.pass_k": 7}, Path("a checkpoint"))


def test_a_checkpoint_with_former_keys_is_rejected_with_their_new_names(config: Path) -> None:
    current = flatten_plain(load_config(config))
    former = {key: value for key, value in current.items() if key != "batching.num_mini_batches"}
    with pytest.raises(ConfigError, match=r"cannot resume .*batching\.num_updates is now batching\.num_mini_batches"):
        check_same_run(former | {"batching.num_updates": 2}, current, Path("a checkpoint"))


def test_resume_rejects_more_steps_if_the_learning_rate_decays_to_the_end(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decay = ["optimizer.lr_decay_style=linear"]
    assert start(config, "run.num_steps=1", *decay) == 0
    capsys.readouterr()
    error = single_error(capsys, start(config, "run.num_steps=2", *decay, "--dry-run"))
    assert "with run.num_steps=2 instead of 1: the learning rate decays to the end" in error


def test_checkpoints_written_after_resuming_an_earlier_one_are_kept(config: Path, tmp_path: Path) -> None:
    keep = ["checkpoint.every=1", "checkpoint.keep_last=2"]
    folder = tmp_path / "run/checkpoints"
    assert start(config, *keep) == 0
    assert start(config, *keep, "run.num_steps=2", "--resume", str(folder / "step_000002")) == 0
    shutil.copytree(folder / "step_000002", tmp_path / "step_000001")
    assert start(config, *keep, "run.num_steps=4", "--resume", str(tmp_path / "step_000001")) == 0
    assert (folder / "latest").read_text() == "step_000004"
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_000003", "step_000004"]


def test_damaged_checkpoints_are_skipped_with_a_warning(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep, folder = ["checkpoint.every=1", "checkpoint.keep_last=4"], tmp_path / "run"
    assert start(config, *keep, "run.num_steps=4") == 0
    uninterrupted = (folder / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(folder)
    assert start(config, *keep, "run.num_steps=3") == 0
    for step in (2, 3):
        weights = max((folder / f"checkpoints/step_00000{step}/policy").iterdir(), key=lambda path: path.stat().st_size)
        os.truncate(weights, 100)
    os.truncate(folder / "checkpoints/step_000003/trainer.json", 10)  # later saves read this file
    capsys.readouterr()
    assert start(config, *keep, "run.num_steps=4", "metrics.console=plain") == 0
    printed = capsys.readouterr().out
    for step in (2, 3):
        assert f"CHECKPOINT step_00000{step} IS DAMAGED and was passed over" in printed
    assert "resumed from step_000001" in printed
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for row, other in zip(rows, map(json.loads, uninterrupted), strict=True):
        if 0 < row["step"] < 4:  # the run of 3 steps also evaluated after its last step
            assert {key: row[key] for key in ("actor/loss", "actor/grad_norm", "critic/score/mean")} == {
                key: other[key] for key in ("actor/loss", "actor/grad_norm", "critic/score/mean")
            }
    # a checkpoint given by --resume is not replaced by another; without a valid checkpoint the run does not start
    os.truncate(folder / "checkpoints/step_000004/integrity.json", 10)
    error = single_error(
        capsys, start(config, *keep, "run.num_steps=5", "--resume", str(folder / "checkpoints/step_000004"))
    )
    assert "integrity.json cannot be read" in error
    for step in (1, 2, 3):
        os.truncate(folder / f"checkpoints/step_00000{step}/trainer.json", 10)
    assert "no checkpoint is valid" in single_error(capsys, start(config, *keep, "run.num_steps=5"))


def test_a_failed_save_keeps_the_previous_checkpoint(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = filesystem_async._write_item

    @functools.wraps(write)  # Megatron reads the signature
    def full(*arguments: object, **options: object) -> object:
        if any("step_000002" in str(getattr(argument, "name", "")) for argument in arguments):
            raise OSError(28, "No space left on device")
        return write(*arguments, **options)

    monkeypatch.setattr(filesystem_async, "_write_item", full)
    error = single_error(capsys, start(config, "checkpoint.every=1", "checkpoint.keep_last=1"))
    assert "cannot write checkpoint" in error
    assert "step_000002" in error
    monkeypatch.undo()
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_000001"
    assert start(config, "checkpoint.every=1", "checkpoint.keep_last=1") == 0
    left = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert left == ["latest", "step_000003"]


def test_a_run_without_a_checkpoint_starts_over(config: Path, tmp_path: Path) -> None:
    assert start(config, "run.num_steps=1") == 0
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert start(config, "run.num_steps=1") == 0
    for name in ("metrics.jsonl", "metrics.discarded.jsonl"):
        rows = [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]
        assert [row["step"] for row in rows] == [0, 1]
