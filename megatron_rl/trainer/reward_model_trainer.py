"""Training loop of a reward model. Every rank runs these same lines."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import torch

from megatron_rl.algorithms.losses import binary_loss, pairwise_loss
from megatron_rl.batching.reward_model import labelled_sequence
from megatron_rl.checkpointing.manager import CheckpointManager
from megatron_rl.checkpointing.resume import check_resumable
from megatron_rl.config import dump_config
from megatron_rl.config.reward_training import RewardTrainingConfig, validate_reward_training
from megatron_rl.data.order import Order
from megatron_rl.data.reward_model_data import Example, RewardDataset, load_reward_dataset
from megatron_rl.data.templates import load_tokenizer
from megatron_rl.distributed.collectives import raise_together
from megatron_rl.distributed.signals import StopRequest
from megatron_rl.errors import ConfigError
from megatron_rl.mcore.learner import Learner
from megatron_rl.mcore.model.config import transformer_config
from megatron_rl.mcore.model.gpt_model import check_weights
from megatron_rl.mcore.model.precision import choose_implementation
from megatron_rl.mcore.optimizer import check_optimizer
from megatron_rl.mcore.reward_model import LOSS, RewardModel, pairwise_loss_reader, read_binary_loss
from megatron_rl.mcore.runtime.parallel import describe_layout, joined_world, launcher_world
from megatron_rl.metrics.metric import Mean, Reduction, merge
from megatron_rl.metrics.timing import Stopwatch
from megatron_rl.models import read_model_spec
from megatron_rl.run_folder import RunFolder
from megatron_rl.trainer.logger import RunLogger, build_log
from megatron_rl.trainer.models import RewardTrainingModels
from megatron_rl.trainer.state import initial_state, is_due
from megatron_rl.types import ParallelContext, TrainSequence, TrainState


class RewardInputs:
    """The data that a training reads; the constructor also runs all checks that need no model."""

    def __init__(self, config: RewardTrainingConfig, world_size: int) -> None:
        """
        Raises:
            ConfigError, DataError, ConversionError: whatever is wrong with configuration, data or model files.
        """
        validate_reward_training(config, world_size)
        run, spec = config.as_run(), read_model_spec(config.model.path)
        transformer_config(spec, run, choose_implementation(run))
        check_optimizer(run)
        check_weights(spec, config.model.path, "value")
        if config.data.max_tokens + 1 > spec.max_position_embeddings:
            raise ConfigError(
                f"data.max_tokens={config.data.max_tokens} needs {config.data.max_tokens + 1} positions, but the model "
                f"has {spec.max_position_embeddings}. Lower data.max_tokens."
            )
        tokenizer = load_tokenizer(config.model.path)
        self.train = load_reward_dataset(config.data.train, config.data, tokenizer)
        self.validation: RewardDataset | None = None
        if config.data.validation is not None:
            self.validation = load_reward_dataset(config.data.validation, config.data, tokenizer)

    def describe(self) -> str:
        """Numbers of training and held-out examples, for the console."""
        held_out = self.validation or RewardDataset(examples=[], num_overlong=0)
        return ", ".join(
            f"{len(dataset.examples)} {name} examples ({dataset.num_overlong} over-long and {dataset.num_unreadable} "
            "unreadable ones dropped)"
            for name, dataset in (("training", self.train), ("held-out", held_out))
        )


def dry_run(config: RewardTrainingConfig, resume: str, *, show: bool) -> None:
    """Run all checks of a real start that need no model.

    Args:
        show: print the resolved configuration and a summary.

    Raises:
        MegatronRLError: as a real start would raise.
    """
    _, world_size, _ = launcher_world()
    inputs, folder = RewardInputs(config, world_size), RunFolder(config.run.output_dir)
    folder.check_writable()
    checkpoint = folder.find_resume(resume)
    if checkpoint is not None:
        check_resumable(checkpoint, config)
    if show:
        print(dump_config(config), end="")
        begins = f"resumes from {checkpoint}" if checkpoint else "begins at step 0"
        print(f"# ok: {world_size} ranks, {inputs.describe()}, {begins}")


def run(config: RewardTrainingConfig, resume: str) -> bool:
    """Train a reward model, from the beginning or from a checkpoint.

    Args:
        resume: "auto", "never" or the path of a checkpoint.

    Returns:
        Whether a scheduler has interrupted the run, so that it should be requeued.

    Raises:
        MegatronRLError: on every rank; what is wrong and what to change.
    """
    _, world_size, _ = launcher_world()
    validate_reward_training(config, world_size)
    with joined_world(config.parallel) as parallel:
        return run_in_world(config, resume, parallel)


def run_in_world(config: RewardTrainingConfig, resume: str, parallel: ParallelContext) -> bool:
    """``run`` for a rank that has joined the world already."""
    stop = StopRequest(parallel)  # first: receives signals while the model is built
    with raise_together(parallel):
        inputs = RewardInputs(config, parallel.world_size)
        folder = RunFolder(config.run.output_dir)
        folder.check_writable()
    checkpoints = CheckpointManager(folder, config, parallel)
    checkpoint, damages = checkpoints.find(resume)
    model = RewardModel(config.as_run(), parallel)
    models = RewardTrainingModels(model, Learner(model, num_steps=config.run.num_steps))
    state = checkpoints.restore(checkpoint, models) if checkpoint else initial_state(parallel)
    with raise_together(parallel):
        if parallel.is_main:
            folder.create(config)
        console, sinks = build_log(config, folder, state, parallel)
    with closing(RunLogger(console, sinks, folder, parallel, None)) as log:
        for note in damages:
            log.note(note)
        resumed = f", resumed from {checkpoint.name}" if checkpoint else ""
        log.note(
            f"{config.run.name}: reward model {config.model.path} in {config.model.dtype} ({config.data.schema}), "
            f"{describe_layout(parallel)}, {config.run.num_steps} steps of {config.data.num_examples_per_step} examples"
            f"{resumed}\n{inputs.describe()}"
        )
        return train(config, state, models, inputs, checkpoints, log, stop)


def train(
    config: RewardTrainingConfig,
    state: TrainState,
    models: RewardTrainingModels,
    inputs: RewardInputs,
    checkpoints: CheckpointManager,
    log: RunLogger,
    stop: StopRequest,
) -> bool:
    """Run steps until the last one, or until a stop is requested.

    Returns:
        Whether a scheduler has interrupted the run, so that it should be requeued.
    """
    model = models.reward_model
    read_loss = pairwise_loss_reader(model.parallel.groups.cp) if config.data.schema == "pairwise" else read_binary_loss
    order = Order(inputs.train.examples, shuffle=config.data.shuffle, seed=config.run.seed)
    if state.step == 0:
        log.step(0, evaluate(inputs.validation, model, log, 0))
    while state.step < config.run.num_steps and not stop.requested():
        stopwatch, step = Stopwatch(), state.step + 1
        examples = order.take(state.num_prompts_consumed, config.data.num_examples_per_step)
        with stopwatch.span("update_reward_model"), models.learner.overlapped_param_gather():
            batches = model.micro_batches([as_sequences(example) for example in examples])
            metrics = models.learner.update(batches, read_loss, name="reward_model", loss=LOSS)
        state = replace(
            state,
            step=step,
            num_prompts_consumed=state.num_prompts_consumed + len(examples),
            num_updates=state.num_updates + 1,
        )
        if is_due(config.validation.every, step, config.run.num_steps):
            with stopwatch.span("testing"):
                metrics = merge([metrics, evaluate(inputs.validation, model, log, step)])
        checkpoints.finish_if_written()
        if is_due(config.checkpoint.every, step, config.run.num_steps):
            with stopwatch.span("save_checkpoint"):
                checkpoints.save(state, models)
        log.step(step, metrics | stopwatch.metrics())
    checkpoints.finish()
    if state.step < config.run.num_steps:
        path = checkpoints.save(state, models, exports=False)
        checkpoints.finish()
        log.note(f"stopped on request after step {state.step}; saved {path}. Start the same command again to continue.")
        return stop.should_requeue()
    return False


def as_sequences(example: Example) -> list[TrainSequence]:
    """The training sequences of an example, one per response."""
    return [labelled_sequence(response.token_ids, response.ends, response.labels) for response in example]


def evaluate(held_out: RewardDataset | None, model: RewardModel, log: RunLogger, step: int) -> dict[str, Reduction]:
    """``val/…`` metrics on the first rank, empty on the others and without held-out examples; collective."""
    if held_out is None:
        return {}
    responses = [response for example in held_out.examples for response in example]
    scores = model.scores([labelled_sequence(response.token_ids, response.ends) for response in responses])
    metrics = held_out_metrics(held_out.examples, scores)
    shown = ", ".join(f"{name.removeprefix('val/')} {metric.result():.4g}" for name, metric in metrics.items())
    log.note(f"held out, step {step}: {shown}")
    return dict(metrics) if model.parallel.is_main else {}


def held_out_metrics(examples: Sequence[Example], scores: Sequence[torch.Tensor]) -> dict[str, Mean]:
    """Accuracy and loss of a reward model on held-out examples.

    Args:
        scores: scores of every response of the examples, in order; [number of labels] each.
    """
    if len(examples[0]) == 2:
        chosen, rejected = torch.cat(list(scores)).unflatten(0, (-1, 2)).unbind(1)
        margins = torch.tensor([pair[0].labels[0] for pair in examples])
        return {
            "val/accuracy": _mean((chosen > rejected).float()),
            "val/loss": _mean(pairwise_loss(chosen, rejected, margins)),
        }
    all_scores = torch.cat(list(scores))
    labels = torch.tensor([label for (response,) in examples for label in response.labels])
    is_right = labels > 0.5
    agreed = ((all_scores > 0) == is_right).float()
    return {
        "val/accuracy": _mean(agreed),
        "val/accuracy_of_right": _mean(agreed[is_right]),
        "val/accuracy_of_wrong": _mean(agreed[~is_right]),
        "val/loss": _mean(binary_loss(all_scores, labels)),
    }


def _mean(values: torch.Tensor) -> Mean:
    return Mean(float(values.sum()), values.numel())
