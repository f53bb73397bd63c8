"""Start the backend that generates responses, with the model's weights."""

from collections.abc import Sequence
from typing import Any

from megatron_rl.config.evaluation import EvalConfig, TaskConfig
from megatron_rl.distributed.collectives import raise_together
from megatron_rl.errors import ConfigError, DataError, MegatronRLError
from megatron_rl.evaluation.backends import EngineBackend, EvalBackend, OpenAIBackend
from megatron_rl.evaluation.generation import RenderedQuestion
from megatron_rl.evaluation.model import eos_token_ids, load_engine
from megatron_rl.models import read_model_spec
from megatron_rl.models.engine_shards import check_engine_size
from megatron_rl.rollout.engines.base import EngineSetup, engine_place
from megatron_rl.rollout.engines.start import start_engine
from megatron_rl.types import ParallelContext
from megatron_rl.weights.hf_files import torch_dtype


def start_backend(
    config: EvalConfig,
    model_folder: str | None,
    tasks: Sequence[tuple[TaskConfig, Sequence[RenderedQuestion]]],
    tokenizer: Any,
    parallel: ParallelContext,
) -> EvalBackend:
    """Start this rank's part of an engine, with the model's weights loaded, or a client of an endpoint; collective.

    Args:
        config: of the evaluation.
        model_folder: Hugging Face folder with config.json and tokenizer; None for an endpoint.
        tasks: each task with all its questions, from which the longest sequence is computed.
        tokenizer: of the model; None for an endpoint.
        parallel: layout of this rank.
    """
    if model_folder is None:
        return OpenAIBackend(config.engine, config.model.path, index=parallel.rank, count=parallel.world_size)
    with raise_together(parallel):
        spec = read_model_spec(model_folder)
        check_engine_size(spec, config.engine.tensor_parallel_size)
        max_model_len = longest_sequence(tasks, spec.max_position_embeddings)
    assert config.engine.name != "openai"
    setup = EngineSetup(
        folder=model_folder,
        spec=spec,
        place=engine_place(parallel, config.engine.tensor_parallel_size),
        device=parallel.device,
        dtype=torch_dtype(config.model.dtype),
        max_num_sequences=config.engine.max_num_sequences,
        max_model_len=max_model_len,
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
        eos_token_ids=eos_token_ids(model_folder),
        max_model_len=max_model_len,
        max_requests=setup.max_num_sequences,
    )


def check_world(config: EvalConfig, world_size: int) -> None:
    """Check that the ranks divide into engines.

    Raises:
        ConfigError: the world size is not a multiple of engine.tensor_parallel_size.
    """
    size = config.engine.tensor_parallel_size
    if world_size % size:
        raise ConfigError(
            f"the world size {world_size} is not a multiple of engine.tensor_parallel_size={size}. "
            f"Start a multiple of {size} ranks, or change engine.tensor_parallel_size."
        )


def longest_sequence(tasks: Sequence[tuple[TaskConfig, Sequence[RenderedQuestion]]], max_positions: int) -> int:
    """Return the number of tokens of the longest prompt with its response, at most ``max_positions``.

    Args:
        tasks: each task with its questions.
        max_positions: context length of the model or of the engine.

    Raises:
        DataError: a prompt fills the context, so that no token is left for a response.
    """
    longest = 1
    for task, questions in tasks:
        lengths = [one.num_tokens for one in questions]
        if max(lengths, default=0) >= max_positions:
            longest_index = lengths.index(max(lengths))
            raise DataError(
                f"question {questions[longest_index].question.index} of task {task.name} has {max(lengths)} tokens; "
                f"the context length is {max_positions}, including the response. Use fewer few-shot examples, or a "
                "model with a longer context."
            )
        max_new_tokens = 1 if task.likelihood is not None else task.sampling.max_new_tokens
        longest = max(longest, min(max_positions, max(lengths, default=0) + max_new_tokens))
    return longest
