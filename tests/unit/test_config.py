"""Config files, overrides, suggestions for unknown keys and values, and validation."""

from math import lcm
from pathlib import Path

import pytest
import yaml

from megatron_rl.algorithms.advantages import ADVANTAGES, TOKEN_ADVANTAGES
from megatron_rl.algorithms.losses import LOSSES
from megatron_rl.config import dump_config, load_config, validate
from megatron_rl.config.curation import CurationConfig
from megatron_rl.config.evaluation import TaskConfig, TemplateConfig, load_evaluation
from megatron_rl.config.foreign_names import FOREIGN_NAMES, FOREIGN_VALUES, RENAMED_KEYS
from megatron_rl.config.load import _dotted_keys, load_as
from megatron_rl.config.plugins import load_symbol
from megatron_rl.config.reward_training import RewardTrainingConfig, validate_reward_training
from megatron_rl.config.schema import RunConfig
from megatron_rl.config.study import load_study
from megatron_rl.errors import ConfigError
from tests.toys import write_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path, tmp_path / "model")


STUDIES = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))
REWARD_TRAININGS = sorted(
    [
        *(ROOT / "configs/algorithms").glob("reward_model_*.yaml"),
        *(ROOT / "configs/recipes/reward_models").glob("*.yaml"),
    ]
)
SUITES = sorted((ROOT / "configs" / "eval").glob("*.yaml"))
TASKS = sorted((ROOT / "configs" / "eval" / "tasks").glob("*.yaml"))
TEMPLATES = sorted((ROOT / "configs" / "eval" / "templates").glob("*.yaml"))
CURATIONS = sorted((ROOT / "configs" / "curation").glob("*.yaml"))
OTHERS = {*STUDIES, *REWARD_TRAININGS, *SUITES, *TASKS, *TEMPLATES, *CURATIONS}
CONFIGS = sorted(set((ROOT / "configs").rglob("*.yaml")) - OTHERS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_config_of_the_project_loads(path: Path) -> None:
    loaded = load_config(path)
    parallel = loaded.parallel
    stages = parallel.pipeline_parallel_size
    ranks = parallel.tensor_parallel_size * parallel.context_parallel_size * stages
    validate(loaded, lcm(ranks, parallel.expert_parallel_size * parallel.expert_tensor_size * stages))


@pytest.mark.parametrize("path", REWARD_TRAININGS, ids=lambda p: p.name)
def test_every_reward_training_config_loads(path: Path, tmp_path: Path) -> None:
    loaded = load_as(RewardTrainingConfig, path)
    validate_reward_training(loaded, 2)
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(loaded))
    assert load_as(RewardTrainingConfig, again) == loaded


@pytest.mark.parametrize("path", SUITES, ids=lambda p: p.name)
def test_every_suite_of_the_project_loads(path: Path) -> None:
    config, tasks = load_evaluation(path, ["model.path=somewhere", "sampling.num_samples=4", "limit=3"])
    assert config.model.path == "somewhere"
    assert tasks
    for task in tasks:
        num_samples = 4 if task.likelihood is None else 1
        assert (task.sampling.num_samples, task.data.limit, max(task.pass_at) <= 4) == (num_samples, 3, True)


@pytest.mark.parametrize("path", CURATIONS, ids=lambda p: p.name)
def test_every_curation_config_of_the_project_loads(path: Path) -> None:
    loaded = load_as(CurationConfig, path, ["generate.model.path=somewhere"])
    assert all((path.parent / name).exists() for name in loaded.contamination.tasks)


def test_every_task_and_template_is_named_after_its_file() -> None:
    assert [load_as(TaskConfig, path).name for path in TASKS] == [path.stem for path in TASKS]
    assert [load_as(TemplateConfig, path).name for path in TEMPLATES] == [path.stem for path in TEMPLATES]


@pytest.mark.parametrize(
    ("suite", "overrides", "message"),
    [
        ("tasks: [a.yaml, b.yaml]", [], r"several tasks have the name 'a'"),
        ("tasks: []", [], r"tasks=\[\]: expected at least one file"),
        ("tasks: [a.yaml]", ["data.b=x.jsonl"], r"data\.b: the suite has no task of that name. Tasks: a"),
        ("tasks: [a.yaml]", ["examples.a=x.jsonl"], r"examples\.a: the suite has no task or template.*: none"),
        ("tasks: [a.yaml]", ["sampling.num_samples=0"], r"sampling\.num_samples=0"),
        ("tasks: [a.yaml]", ["limt=3"], r"unknown key limt\. Did you mean limit"),
        ("tasks: [a.yaml]", ["engine.name=other"], r"engine\.name"),
        ("tasks: [a.yaml]", ["engine.name=openai"], r"engine\.url=None: expected a URL with engine\.name=openai"),
        ("tasks: [a.yaml]", ["engine.url=http://x"], r"engine\.url=http://x: expected a URL with engine\.name=openai"),
        ("tasks: [c.yaml]", [], r"c\.yaml"),
    ],
)
def test_invalid_suites_are_rejected(suite: str, overrides: list[str], message: str, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text(TASKS[0].read_text().replace(f"name: {TASKS[0].stem}", "name: a"))
    path = tmp_path / "suite.yaml"
    path.write_text(f"run: {{name: x, output_dir: y}}\nmodel: {{path: z}}\n{suite}\n")
    with pytest.raises(ConfigError, match=message):
        load_evaluation(path, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batching.micro_batch_size=3"], r"micro_batch_size=3: expected an even number"),
        (["data.step_separator=x"], r"data\.step_separator='x': expected its default with data\.schema=pairwise"),
        (["optimizer.lr_decay_updates=5"], r"lr_decay_updates=5 must be above optimizer\.lr_warmup_updates=20"),
        (["batching.num_mini_batches=2"], r"batching\.num_mini_batches=2: expected 1"),
        (["run.rollout_only=true"], r"run\.rollout_only=True: expected False"),
        (["memory.offload=[grads]"], r"memory\.offload=\['grads'\]: expected \[\]"),
        (["data.max_tokens=9000"], r"too small for 2 sequence\(s\).*at least 18002"),
        (["data.validation=null"], r"validation\.every=50 needs held-out rows"),
        (["parallel.tensor_parallel_size=4"], r"world size 2 is not divisible"),
    ],
)
def test_invalid_reward_trainings_are_rejected(overrides: list[str], message: str) -> None:
    path = ROOT / "configs/algorithms/reward_model_outcome.yaml"
    with pytest.raises(ConfigError, match=message):
        validate_reward_training(load_as(RewardTrainingConfig, path, overrides), 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["aggregation=prod", "step_separator=x"], r"activation=none: expected sigmoid"),
        (["aggregation=mean"], r"aggregation=mean: expected min, the default, without reward\.model\.step_separator"),
        (["step_separator=''"], r"step_separator=''"),
    ],
)
def test_invalid_reward_models_are_rejected(config: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config, [REWARD_MODEL, *(f"reward.model.{text}" for text in overrides)])


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.name)
def test_every_study_of_the_project_loads(path: Path) -> None:
    study = load_study(path)
    for name, run in study.runs.items():
        loaded = load_config(ROOT / run.config, study.overrides_of(name, 7))
        validate(loaded, study.num_ranks)
        assert loaded.run.seed == 7
        assert "seed_7" in loaded.model.path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metric: x\nseeds: [0]\nrun: {a: {config: b}}", "run"),
        ("metric: x\nruns: {a: {config: b}}", "seeds"),
        ("metric: x\nseeds: []\nruns: {a: {config: b}}", "seeds=.*at least one seed"),
        ("metric: x\nseeds: [a]\nruns: {a: {config: b}}", "seeds"),
        ("metric: x\nseeds: [0]\nruns: {a: {overrides: []}}", "config"),
    ],
)
def test_invalid_studies_are_rejected(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_study(tmp_path / "study.yaml")


def test_overrides_take_precedence_and_a_dumped_config_loads_again(config: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(f"base: {config.name}\noptimizer: {{lr: 5.0e-4}}\nrollout: {{group_size: 2}}\n")
    loaded = load_config(child, ["optimizer.lr=2e-4", "data.train.split=test", "rollout.stop_token_ids=[3,4]"])
    assert (loaded.optimizer.lr, loaded.rollout.group_size, loaded.rollout.num_prompts_per_step) == (2e-4, 2, 4)
    assert loaded.data.train.split == "test"
    assert loaded.rollout.stop_token_ids == [3, 4]
    again = tmp_path / "resolved.yaml"
    again.write_text(dump_config(loaded))
    assert load_config(again) == loaded


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("optimizer.learning_rte", "optimizer.lr"),
        ("rollout.group_sise", "rollout.group_size"),
        ("rollout.temprature", "rollout.temperature"),
        ("trainer.total_training_steps", "run.num_steps"),
        ("actor.kl_loss_coef", "algorithm.kl_coef"),
        ("num_generations", "rollout.group_size"),
        ("grpo.num_generations_per_prompt", "rollout.group_size"),
        ("n-samples-per-prompt", "rollout.group_size"),
        ("beta", "algorithm.kl_coef"),
        ("lr", "optimizer.lr"),
        ("algorithm.rollout_correction.rollout_rs", "algorithm.rollout_rejection"),
        ("rs_veto_threshold", "algorithm.rollout_veto"),
        ("vllm_importance_sampling_mode", "algorithm.rollout_is"),
    ],
)
def test_unknown_keys_get_a_suggestion(config: Path, key: str, suggestion: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key .*Did you mean {suggestion}"):
        load_config(config, [f"{key}=1"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("batching.num_updates", "batching.num_mini_batches"),
        ("algorithm.keep_most_spread", "algorithm.top_std_fraction"),
        ("run.stuck_after_s", "run.hang_timeout_s"),
        ("run.stop_before_end_s", "run.stop_margin_s"),
        ("memory.if_too_large", "memory.on_overcommit"),
        ("rollout.partial", "rollout.partial_rollout"),
        ("rollout.asynchronous", "rollout.async_rollout"),
        ("rollout.sleep", "rollout.sleep_engine"),
        ("data.evaluation", "data.validation"),
        ("data.evaluation.kind", "data.validation.kind"),
        ("data.evaluation.path", "data.validation.path"),
        ("data.evaluation.options.seed", "data.validation.options"),
        ("evaluation", "validation"),
        ("evaluation.every", "validation.every"),
        ("evaluation.num_prompts", "validation.num_prompts"),
        ("evaluation.temperature", "validation.temperature"),
        ("evaluation.max_new_tokens", "validation.max_new_tokens"),
        ("evaluation.functions", "validation.functions"),
        ("evaluation.suite", "benchmarks.suite"),
        ("evaluation.suite_every", "benchmarks.every"),
    ],
)
def test_a_renamed_key_is_reported_with_its_new_name(config: Path, tmp_path: Path, old: str, new: str) -> None:
    message = rf"unknown key {old}\. Did you mean {new}\?"
    with pytest.raises(ConfigError, match=message):
        load_config(config, [f"{old}=1"])
    section: object = 1
    for part in reversed(old.split(".")):
        section = {part: section}
    child = tmp_path / "child.yaml"
    child.write_text(yaml.safe_dump({"base": config.name, **section}))  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=message):
        load_config(child)


def test_a_renamed_section_of_a_reward_training_is_reported_with_its_new_name() -> None:
    path = ROOT / "configs/algorithms/reward_model_outcome.yaml"
    with pytest.raises(ConfigError, match=r"unknown key evaluation\.every\. Did you mean validation\.every\?"):
        load_as(RewardTrainingConfig, path, ["evaluation.every=1"])


def test_every_suggestion_for_a_foreign_or_former_name_exists() -> None:
    existing = set(_dotted_keys(RunConfig))
    assert {*FOREIGN_NAMES.values(), *RENAMED_KEYS.values(), *FOREIGN_VALUES} <= existing
    assert not existing & set(RENAMED_KEYS)


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("algorithm.advantage", "group", "grpo"),
        ("algorithm.advantage", "reinforce_plus_plus", "reinforce with algorithm.whiten_advantages=true"),
        ("algorithm.advantage", "remax", "reinforce with rollout.greedy_baseline=true"),
        ("algorithm.loss", "clipped", "ppo_clip"),
        ("algorithm.loss", "vanilla", "ppo_clip"),
        ("algorithm.loss", "ppo_clp", "ppo_clip"),
        ("memory.on_overcommit", "refuse", "error"),
        ("algorithm.aggregation", "seq-mean-token-mean", "sequence_mean"),
        ("algorithm.kl_estimator", "low_var_kl", "k3"),
    ],
)
def test_a_former_or_foreign_value_gets_its_counterpart(config: Path, key: str, old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}.*{old}.* Did you mean {new}\?"):
        _load_with_plugins(config, [f"{key}={old}"])


def _load_with_plugins(config: Path, overrides: list[str]) -> None:
    algorithm = load_config(config, overrides).algorithm
    load_symbol(algorithm.loss, LOSSES, "algorithm.loss")
    load_symbol(algorithm.advantage, ADVANTAGES | TOKEN_ADVANTAGES, "algorithm.advantage")


@pytest.mark.parametrize("key", sorted(FOREIGN_VALUES))
def test_every_counterpart_of_a_foreign_value_is_valid(config: Path, key: str) -> None:
    for suggestion in FOREIGN_VALUES[key].values():
        value, _, others = suggestion.partition(" with ")
        overrides = [f"{key}={value}", *(others.split(" and ") if others else [])]
        overrides += ["algorithm.reference_path=teacher"] if value == "distillation" else []
        algorithm = load_config(config, overrides).algorithm
        assert algorithm.loss in LOSSES
        assert algorithm.advantage in {*ADVANTAGES, *TOKEN_ADVANTAGES, "process", "distillation"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lr=fast"], r"optimizer\.lr.*fast"),
        (["optimizer.lr=-1"], r"optimizer\.lr=-1.*more than 0"),
        (["model.dtype=fp16"], r"dtype.*fp16"),
        (["rollout.temperature=0"], r"rollout\.temperature=0"),
        (["parallel.sequence_parallel=true"], r"parallel\.sequence_parallel"),
        (["nonsense"], "expected key=value"),
        (["run=3"], "run is 3: expected a section"),
        (["algorithm.rollout_is=geometric_mask"], r"rollout_is.*geometric_mask"),
        (["algorithm.rollout_is_high=0.9"], r"rollout_is_high=\(0\.5, 0\.9\): expected .*high 1 or more"),
        (["algorithm.rollout_rejection=geometric"], r"\(None, None\): expected both bounds .*geometric.* 0\.999 and 1"),
        (["algorithm.rollout_rejection_low=1.1"], r"rollout_rejection_high=\(1\.1, None\): expected low from 0 to 1"),
        (["algorithm.clip_ratio_dual=1.1"], r"clip_ratio_dual=1\.1: expected null, or more than .* = 1\.2"),
        (["algorithm.loss=cispo", "algorithm.clip_ratio_dual=3"], r"because algorithm\.loss=cispo ignores it"),
        (["algorithm.loss=nll", "algorithm.whiten_advantages=true"], r"whiten_advantages=True: expected its default"),
        (["algorithm.accept_max_per_prompt=2"], r"expected null without algorithm\.accept_min_reward"),
        (["algorithm.kl_coef=0", "algorithm.kl_unbiased=true"], r"kl_unbiased=True: expected false with kl_coef=0"),
        (["algorithm.kl_coef=0", "algorithm.reference_reset_every=2"], r"reference_reset_every=2: expected 0 without"),
        (["algorithm.gae_lambda=0.9"], r"gae_lambda=0\.9: expected 1 without algorithm\.advantage=gae or bi_level_gae"),
        (["algorithm.advantage=gae", "algorithm.turn_gamma=0.9"], r"turn_gamma=0\.9: expected 1 without .*turn_gae"),
        (["algorithm.advantage=gae", "algorithm.loss=nll"], r"loss=nll: expected a loss that uses advantages"),
        (["algorithm.advantage=distillation"], r"reference_path=None: expected the folder of the teacher"),
        (
            ["algorithm.advantage=distillation", "algorithm.reference_path=x", "algorithm.kl_reward_coef=0.1"],
            r"kl_reward_coef=0\.1: expected 0 with algorithm\.advantage=distillation",
        ),
        (["algorithm.kl_reward_target=0.1"], r"kl_reward_target=0\.1: expected null, or more than 0 with an initial"),
        (["algorithm.top_std_fraction=0"], r"top_std_fraction=0\.0: expected above 0 and at most 1"),
        (["critic.clip_value=0"], r"critic\.clip_value=0"),
        (["algorithm.rollout_veto=1"], r"rollout_veto=1.*between 0 and 1"),
        (["reward.functions=[{nam: math}]"], r"unknown key reward\.functions\.nam\. Did you mean"),
    ],
)
def test_invalid_values_are_rejected(config: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config, overrides)


def test_missing_broken_and_looping_files_are_rejected(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        load_config(tmp_path / "missing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: [")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(broken)
    broken.write_text("base: broken.yaml\n")
    with pytest.raises(ConfigError, match="base chain loops"):
        load_config(broken)
    broken.write_text("run: {name: x, output_dir: y, num_steps: 1}\n")
    with pytest.raises(ConfigError, match=r"required keys are not set.*model"):
        load_config(broken)


PPO = "algorithm.advantage=gae"
DISTILLATION = ("algorithm.advantage=distillation", "algorithm.reference_path=teacher")
PENALTY = ("algorithm.kl_reward_coef=0.1", "algorithm.kl_reward_target=0.1")
REWARD_MODEL = "reward.model.path=judge"
SHORTER = "[{from_step: 1}, {from_step: 2, max_new_tokens: 4}]"
DEMONSTRATIONS = ("rollout.source=demonstrations", "algorithm.loss=nll", "data.train.demonstration_field=text")


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"], 6, "world size 6 is not divisible"),
        (["batching.num_mini_batches=3"], 1, r"16 sequences .* are not divisible by batching\.num_mini_batches=3"),
        (["rollout.group_size=1"], 1, r"rollout\.group_size=1"),
        (["algorithm.advantage=pass_at_k"], 1, r"pass_k=4 must be below rollout\.group_size=4"),
        (["algorithm.loss=nll"], 1, r"loss=nll imitates all responses that the policy sampled.*accept_min_reward"),
        (
            [*DEMONSTRATIONS, "algorithm.kl_coef=0", "algorithm.accept_min_reward=0"],
            1,
            r"accept_min_reward=0\.0 does not apply",
        ),
        (["batching.max_tokens_per_micro_batch=10"], 1, r"at least 16"),
        (["critic.warmup_steps=3"], 1, r"critic is set, but algorithm\.advantage=grpo uses no critic"),
        ([PPO, "critic.parallel.tensor_parallel_size=2"], 1, r"the critic.*world size 1 is not divisible"),
        ([PPO, "critic.optimizer.lr_warmup_updates=5", "critic.optimizer.lr_decay_updates=4"], 1, r"in the critic.*=4"),
        ([PPO, "algorithm.accept_min_reward=1"], 1, r"would be trained on the accepted responses alone"),
        (["rollout.greedy_baseline=true"], 1, r"greedy_baseline=true with algorithm\.advantage=grpo"),
        (["algorithm.top_std_fraction=0.5", "rollout.max_seconds_per_round=9"], 1, r"number of groups of a step"),
        ([PPO, "rollout.group_size=1", "algorithm.top_std_fraction=0.5"], 1, r"group of one is always 0"),
        ([*DISTILLATION, "rollout.dynamic_sampling=true"], 1, r"expected rollout\.dynamic_sampling=false"),
        ([*PENALTY, "algorithm.kl_reward_horizon=8"], 1, r"kl_reward_horizon=8 is below the 16 responses"),
        (
            ["rollout.partial_rollout=true", "rollout.max_staleness=1", f"data.curriculum={SHORTER}"],
            1,
            r"shortens responses \(max_new_tokens \[8, 4\]\)",
        ),
        (["reward.functions=[]"], 1, r"reward\.functions is empty"),
        ([REWARD_MODEL, "rollout.dynamic_sampling=true"], 1, r"dynamic_sampling=True with reward\.model"),
        ([REWARD_MODEL, "rollout.source=replay", "rollout.replay_path=x"], 1, r"source=replay with reward\.model"),
        (
            [REWARD_MODEL, *DISTILLATION, "algorithm.kl_coef=0"],
            1,
            r"distillation with reward\.model: this estimator reads no rewards",
        ),
        (["rollout.source=demonstrations"], 1, r"algorithm\.loss=nll"),
        (["rollout.source=demonstrations", "algorithm.loss=nll"], 1, r"data\.train\.demonstration_field"),
        ([*DEMONSTRATIONS, "algorithm.rollout_is=token_mask"], 1, r"rollout_is=token_mask does not apply"),
        ([*DEMONSTRATIONS, "algorithm.rollout_veto=0.001"], 1, r"rollout_veto=0\.001 does not apply"),
        (["optimizer.lr_warmup_updates=5", "optimizer.lr_decay_updates=5"], 1, r"lr_decay_updates=5"),
        (["data.validation=null", "validation.every=1"], 1, r"validation\.every=1"),
    ],
)
def test_contradictory_settings_are_rejected(config: Path, overrides: list[str], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(load_config(config, overrides), world_size)


def test_a_config_is_frozen(config: Path) -> None:
    with pytest.raises(AttributeError):
        load_config(config).optimizer.lr = 1.0  # type: ignore[misc]
