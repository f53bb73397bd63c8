"""Plans: memory and time of a configuration, errors if it does not fit, and the production recipes."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.config import RunConfig, load_config, validate
from megatron_rl.config.parallel import ParallelSection
from megatron_rl.errors import ConfigError
from megatron_rl.models import layout_table, read_model_spec
from megatron_rl.planning.hardware import KNOWN_HARDWARE, Hardware, read_hardware
from megatron_rl.planning.plan import Plan, check_fits, describe, make_plan
from megatron_rl.planning.search import MEMORY_MARGIN, search, settings
from megatron_rl.planning.shares import layers_of_stages, stage_shares
from megatron_rl.weight_sync.placement import parameters_by_rank
from megatron_rl.weights.layout import box_size
from tests import forked

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "configs/model_shapes"
RECIPES = sorted(path for path in (ROOT / "configs/recipes/production").glob("*.yaml") if "base-" not in path.name)
NAME = re.compile(r"-(\d+)n(\d+)g-([a-z]+\d+)-")
HARDWARE = {"a100": "a100-80g", "h100": "h100-80g", "h200": "h200-141g"}


def recipe_config(recipe: Path, *overrides: str) -> RunConfig:
    """Load a recipe with the published config.json of its model in place of a folder with weights."""
    name = Path(load_config(recipe).model.path).name
    return load_config(recipe, [f"model.path={MODELS / name}", *overrides])


def machine(recipe: Path) -> tuple[Hardware, int]:
    fields = NAME.search(recipe.name)
    assert fields is not None, recipe.name
    return KNOWN_HARDWARE[HARDWARE[fields[3]]], int(fields[1]) * int(fields[2])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_production_recipes_fit_on_their_hardware_and_not_on_half_of_it(recipe: Path) -> None:
    config, (hardware, world_size) = recipe_config(recipe), machine(recipe)
    validate(config, world_size)
    plan = make_plan(config, hardware, world_size)
    assert plan.shortfalls == []
    check_fits(plan)
    half = make_plan(config, replace(hardware, device_gb=hardware.device_gb / 2), world_size)
    assert half.shortfalls
    with pytest.raises(ConfigError, match=r"does not fit on .* Change: .*=.*on_overcommit=warn"):
        check_fits(half)


def test_the_table_of_the_recipes_is_up_to_date() -> None:
    done = forked.run([sys.executable, "tools/cluster/plan_recipes.py"])
    assert done.stdout == (ROOT / "configs/recipes/production/README.md").read_text()


SHAPES = {path.name: read_model_spec(path) for path in sorted(MODELS.iterdir())}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        (name, sizes)
        for name, spec in SHAPES.items()
        for sizes in ((1, 1, 1), (2, 2, 1), (4, 4, 1), *([(1, 2, 8)] if spec.moe is not None else []))
    ],
    ids=str,
)
def test_stage_shares_equal_those_of_the_layout_table(name: str, sizes: tuple[int, int, int]) -> None:
    spec, (tp, pp, ep) = SHAPES[name], sizes
    section = ParallelSection(
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        expert_parallel_size=ep,
        expert_tensor_parallel_size=1 if spec.moe is not None else None,
    )
    table = layout_table(spec, tp)
    held = parameters_by_rank(spec, tp=tp, pp=pp, dp=ep, ep=ep)
    for stage, share in enumerate(stage_shares(spec, section)):
        names, place = held[stage * tp * ep]
        padded = sum(_elements(place.shape(table[one])) for one in names)
        assert share.total == padded
        assert share.experts == sum(_elements(place.shape(table[one])) for one in names if table[one].expert)
        assert share.num_layers == spec.num_layers // pp
        assert (share.output > 0) == (stage == pp - 1)


def _elements(shape: tuple[int, ...]) -> int:
    return box_size(tuple((0, extent) for extent in shape))


def test_layers_are_split_over_uneven_stages() -> None:
    spec = read_model_spec(MODELS / "Qwen2.5-7B")  # 28 layers
    assert layers_of_stages(spec, ParallelSection(pipeline_parallel_size=4)) == [7, 7, 7, 7]
    uneven = ParallelSection(
        pipeline_parallel_size=4, num_layers_in_first_pipeline_stage=5, num_layers_in_last_pipeline_stage=7
    )
    assert layers_of_stages(spec, uneven) == [5, 8, 8, 7]
    counted = ParallelSection(
        pipeline_parallel_size=5, account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True
    )
    assert layers_of_stages(spec, counted) == [5, 6, 6, 6, 5]
    with pytest.raises(ConfigError, match=r"pipeline_parallel_size=3 does not divide the model's 28 layers"):
        layers_of_stages(spec, ParallelSection(pipeline_parallel_size=3))


def plan_7b(*overrides: str, world_size: int = 8) -> Plan:
    recipe = next(path for path in RECIPES if path.name.startswith("grpo-qwen2.5-7b-1n8g-h100"))
    return make_plan(recipe_config(recipe, *overrides), KNOWN_HARDWARE["h100-80g"], world_size)


def test_memory_savings_appear_in_the_plan() -> None:
    baseline = plan_7b()
    in_update = baseline.memory.total("update")
    assert plan_7b("memory.recompute=full").memory.total("update") < in_update
    assert plan_7b("batching.max_tokens_per_micro_batch=5120").memory.total("update") < in_update
    assert plan_7b("parallel.tensor_parallel_size=4").memory.total("update") < in_update
    assert plan_7b(world_size=16).memory.total("update") < in_update  # the optimizer is shared by more
    offloaded = plan_7b("memory.offload=[params,grads,optimizer]").memory
    assert offloaded.total("generation") < baseline.memory.total("generation")
    assert offloaded.total("update") == in_update
    assert sum(offloaded.host.values()) > sum(baseline.memory.host.values())
    assert plan_7b("rollout.sleep_engine=false").shortfalls
    lora = plan_7b("lora.rank=16", "lora.quantize=nf4").memory.phases["update"]
    assert lora["policy grads"] < 0.05 * baseline.memory.phases["update"]["policy grads"]
    assert lora["policy params"] < 0.5 * baseline.memory.phases["update"]["policy params"]


def test_time_estimates_follow_the_settings() -> None:
    baseline = plan_7b().seconds
    assert plan_7b("memory.recompute=full").seconds["update"] > baseline["update"]
    assert plan_7b("precision.fp8=disabled").seconds["update"] > baseline["update"]
    assert plan_7b(world_size=16).seconds["update"] < baseline["update"]
    deep = plan_7b(
        "parallel.tensor_parallel_size=1", "parallel.sequence_parallel=false", "parallel.pipeline_parallel_size=4"
    )
    assert deep.seconds["weight push"] > baseline["weight push"]
    assert plan_7b("algorithm.kl_coef=0.01").seconds["log-probabilities"] == pytest.approx(
        2 * baseline["log-probabilities"]
    )


def test_a_short_cache_and_a_small_host_do_not_fit() -> None:
    short = plan_7b(
        "rollout.max_new_tokens=120000",
        "rollout.engine_options.gpu_memory_utilization=0.25",
        "batching.max_tokens_per_micro_batch=121024",
        "rollout.tensor_parallel_size=1",
    )
    assert any("an engine's cache holds" in reason for reason in short.shortfalls)
    recipe = RECIPES[0]
    hardware, world_size = machine(recipe)
    small = make_plan(recipe_config(recipe), replace(hardware, host_gb=64.0), world_size)
    assert any("a host needs" in reason and "checkpoint in background" in reason for reason in small.shortfalls)


def test_search_finds_layouts_that_fit_with_a_margin() -> None:
    recipe = next(path for path in RECIPES if "70b-8n8g-h100" in path.name)
    config, hardware = recipe_config(recipe), KNOWN_HARDWARE["h100-80g"]
    plans = search(config, hardware, 64)
    assert plans
    assert [plan.step_s for plan in plans] == sorted(plan.step_s for plan in plans)
    for plan in plans[:20]:
        assert plan.memory.total(plan.memory.fullest) / 1e9 <= (1 - MEMORY_MARGIN) * hardware.device_gb
        again = recipe_config(recipe, *settings(plan, config).split())
        assert make_plan(again, hardware, 64).step_s == pytest.approx(plan.step_s)
    assert search(config, hardware, 8) == []


def test_the_command_reports_what_does_not_fit(tmp_path: Path) -> None:
    recipe = next(path for path in RECIPES if "70b-8n8g-h100" in path.name)

    def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "tools/plan.py", "--config", str(recipe), *arguments]
        return forked.run(command)

    fits = plan("--nodes", "8", f"model.path={MODELS / 'Llama-3.1-70B-Instruct'}")
    assert fits.returncode == 0, fits.stderr
    assert "TP8 x PP4 x DP2, vllm of TP8" in fits.stdout
    assert "\nfits: " in fits.stdout
    too_large = plan("--nodes", "8", "memory.recompute=disabled", "batching.max_tokens_per_micro_batch=65536")
    assert too_large.returncode == 3
    assert "planning with configs/model_shapes/Llama-3.1-70B-Instruct" in too_large.stderr
    assert "does not fit: update needs" in too_large.stdout
    assert "change: memory.recompute=full" in too_large.stdout
    assert plan("--nodes", "1", "--search").returncode == 3
    unknown = plan("--hardware", "h300")
    assert unknown.returncode == 1
    assert "hardware 'h300' is not known. Choose one of a100-80g" in unknown.stderr
    own = tmp_path / "own.yaml"
    own.write_text("name: own\nranks_per_node: many\n")
    assert "ranks_per_node: Value 'many'" in plan("--hardware", str(own)).stderr


def test_a_hardware_file_is_read_and_validated(tmp_path: Path) -> None:
    values = {**vars(KNOWN_HARDWARE["a100-80g"]), "name": "ours", "device_gb": 40.0}
    path = tmp_path / "ours.yaml"
    path.write_text(json.dumps(values))
    assert read_hardware(str(path)) == replace(KNOWN_HARDWARE["a100-80g"], name="ours", device_gb=40.0)
    path.write_text(json.dumps({**values, "device_gb": -1}))
    with pytest.raises(ConfigError, match=r"hardware ours: device_gb=-1\.0: expected a number, 0 or more"):
        read_hardware(str(path))


def test_the_text_of_a_plan_lists_every_item() -> None:
    text = describe(plan_7b())
    for word in ("policy grads", "engine cache", "activations", "transfer buffers", "GB of a host", "tokens/s/rank"):
        assert word in text
