"""Who answers, started with the model's weights."""

from collections.abc import Sequence
from typing import Any

from megatron_rl.config.evaluation import EvalConfig, TaskConfig
from megatron_rl.distributed.collectives import raise_together
from megatron_rl.errors import ConfigError, DataError, MegatronRLError
from megatron_rl.evaluation.backends import EngineBackend, EvalBackend, OpenAIBackend
from megatron_rl.evaluation.generation import RenderedQuestion
from megatron_rl.evaluation.model import end_tokens, load_engine
from megatron_rl.models import read_model_spec
from megatron_rl.models.engine_shards import check_engine_size
from megatron_rl.rollout.engines.base import EngineSetup, engine_place
from megatron_rl.rollout.engines.start import start_engine
from megatron_rl.types import ParallelContext
from megatron_rl.weights.hf_files import torch_dtype


def start_backend(
    config: EvalConfig,
    described: str | None,
    asked: Sequence[tuple[TaskConfig, Sequence[RenderedQuestion]]],
    tokenizer: Any,
    parallel: ParallelContext,
) -> EvalBackend:
    """This rank's part of an engine, with the model's weights, or an endpoint; collective.

    Args:
        described: folder with config.json and tokenizer; None for an endpoint.
        asked: all that it will be asked.
    """
    if described is None:
        return OpenAIBackend(config.engine, config.model.path, index=parallel.rank, count=parallel.world_size)
    with raise_together(parallel):
        spec = read_model_spec(described)
        check_engine_size(spec, config.engine.tensor_parallel_size)
        longest = longest_sequence(asked, spec.max_position_embeddings)
    assert config.engine.name != "openai"
    setup = EngineSetup(
        folder=described,
        spec=spec,
        place=engine_place(parallel, config.engine.tensor_parallel_size),
        device=parallel.device,
        dtype=torch_dtype(config.model.dtype),
        max_num_sequences=config.engine.max_num_sequences,
        max_model_len=longest,
        local_rank=parallel.local_rank,
        timeout_s=config.engine.timeout_s,
        options=config.engine.options,
    )
    engine = start_engine(config.engine.name, setup, parallel, seed=config.run.seed)
    try:
        with raise_together(parallel):
            load_engine(engine, spec, config.model.path)
    except MegatronRLError:
        engine.close()
        raise
    return EngineBackend(
        engine,
        tokenizer,
        ends=end_tokens(described),
        max_model_len=longest,
        max_requests=setup.max_num_sequences,
    )


def check_world(config: EvalConfig, world_size: int) -> None:
    """
    Raises:
        ConfigError: the ranks do not divide into engines.
    """
    size = config.engine.tensor_parallel_size
    if world_size % size:
        raise ConfigError(
            f"world size {world_size} does not divide by engine.tensor_parallel_size={size}. "
            f"Start a multiple of {size} ranks or change the key."
        )


def longest_sequence(asked: Sequence[tuple[TaskConfig, Sequence[RenderedQuestion]]], positions: int) -> int:
    """Tokens of prompt and response that an engine must be ready for.

    Args:
        positions: that the model has, or that an engine has room for.

    Raises:
        DataError: a prompt leaves no room for an answer.
    """
    longest = 1
    for task, questions in asked:
        lengths = [one.num_tokens for one in questions]
        if max(lengths, default=0) >= positions:
            place = lengths.index(max(lengths))
            raise DataError(
                f"question {questions[place].question.index} of task {task.name} has {max(lengths)} tokens, and there "
                f"is room for {positions}. Use fewer examples, or another model."
            )
        room = 1 if task.likelihood is not None else task.sampling.max_new_tokens
        longest = max(longest, min(positions, max(lengths, default=0) + room))
    return longest
