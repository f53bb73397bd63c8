"""What a run reads before anything is built: tokenizer, prompts, environment, benchmarks."""

from dataclasses import dataclass
from typing import Any

from megatron_rl.config import RunConfig, validate
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.data.curriculum import Curriculum
from megatron_rl.data.prompts import PromptSet, load_prompts
from megatron_rl.data.templates import load_tokenizer
from megatron_rl.distributed.collectives import raise_together
from megatron_rl.environments import build_environment
from megatron_rl.evaluation.in_training import BenchmarkSuite, read_benchmark_suite
from megatron_rl.rollout.multi_turn import MultiTurn
from megatron_rl.trainer.preflight import check_models, check_plugins, check_prompts
from megatron_rl.types import ParallelContext


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run reads."""

    tokenizer: Any
    train: PromptSet
    validation: PromptSet | None
    """Held-out prompts; None without ``data.validation``."""
    curriculum: Curriculum
    multi_turn: MultiTurn | None
    """None without ``rollout.environment``."""
    benchmarks: BenchmarkSuite | None
    """None without ``benchmarks.suite``."""


def read_inputs(config: RunConfig, parallel: ParallelContext) -> Inputs:
    """``load_inputs`` on every rank; all raise when one of them finds something wrong."""
    with raise_together(parallel):
        return load_inputs(config, parallel.world_size)


def load_inputs(config: RunConfig, world_size: int) -> Inputs:
    """Read everything that a run reads, and check everything that needs no model.

    Raises:
        ConfigError, DataError, ConversionError: whatever is wrong with configuration, data or model files.
    """
    validate(config, world_size)
    spec = check_models(config)
    check_plugins(config)
    multi_turn = build_multi_turn(config.rollout)
    tokenizer = load_tokenizer(config.model.path)
    train = load_prompts(config.data.train, config.data, tokenizer)
    curriculum = Curriculum(
        train.prompts, config.data, max_new_tokens=config.rollout.max_new_tokens, seed=config.run.seed
    )
    validation = None
    if config.data.validation is not None:
        validation = load_prompts(config.data.validation, config.data, tokenizer)
    for prompts in (train, validation):
        if prompts is not None:
            check_prompts(prompts, spec, config)
    benchmarks = read_benchmark_suite(config, tokenizer)
    if benchmarks is not None:
        benchmarks.max_sequence_length(spec.max_position_embeddings)
    return Inputs(
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        curriculum=curriculum,
        multi_turn=multi_turn,
        benchmarks=benchmarks,
    )


def build_multi_turn(config: RolloutSection) -> MultiTurn | None:
    """The environment and how it is rendered; None without one."""
    if config.environment is None:
        return None
    environment = build_environment(config.environment, config.environment_options)
    return MultiTurn(environment=environment, max_turns=config.max_turns, template=config.turn_template)
