"""What the ranks of a gang run; the tests around them compare."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.batching.align import align
from megatron_rl.config import RunConfig
from megatron_rl.loop import run_in
from megatron_rl.mcore import patches
from megatron_rl.mcore.attention import packed_sequences
from megatron_rl.mcore.checkpoint import load_policy, save_policy
from megatron_rl.mcore.parallel import split_world
from megatron_rl.mcore.policy import Policy, ScoringModel
from megatron_rl.types import ParallelContext, TrainBatch, UpdatePlan
from tests.toys import VOCAB, sequences

# after megatron_rl.mcore, which prepares Megatron-Core for the CPU
from megatron.core import parallel_state, tensor_parallel  # isort: skip
from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip

_worlds: dict[tuple[int, int], tuple[ParallelContext, dict[str, Any]]] = {}
_counters = itertools.count()


def world(config: RunConfig) -> ParallelContext:
    """A split of this gang, with counters of its own.

    A process can only open so many groups, and Megatron never closes one; so each split is made
    once, and Megatron's record of it is put back when it is wanted again.
    """
    key = (config.parallel.tensor_parallel_size, config.parallel.pipeline_parallel_size)
    store = dist.PrefixStore(f"world{next(_counters)}", dist.distributed_c10d._get_default_store())
    if key not in _worlds:
        context = split_world(config.parallel, store, 0, torch.device("cpu"))
        _worlds[key] = (context, _megatron_globals())
    context, record = _worlds[key]
    for name, value in record.items():
        setattr(parallel_state, name, value)
    return replace(context, store=store)


def _megatron_globals() -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(parallel_state).items()
        if name.startswith("_") and not name.startswith("__") and not callable(value)
    }


def logits(config: RunConfig) -> torch.Tensor | None:
    """Whole-vocabulary logits of the toy sequences, on the last stage."""
    parallel = world(config)
    scorer = ScoringModel(config, parallel, config.model.path)
    multiple = parallel.tp_size if config.parallel.sequence_parallel else 1
    batch = align(sequences(), packed=config.batching.packed, multiple_of=multiple)
    packing = None if batch.cu_seqlens is None else packed_sequences(batch.cu_seqlens, parallel.device)

    def step(_: Any, model: torch.nn.Module) -> Any:
        output = model(batch.tokens, batch.position_ids, None, packed_seq_params=packing)

        def collect(output: torch.Tensor) -> Any:
            whole = tensor_parallel.gather_from_tensor_model_parallel_region(output)[..., :VOCAB]
            rows = (
                whole[0].split([*batch.lengths, whole.size(1) - sum(batch.lengths)])[:-1]
                if packing
                else [row[:length] for row, length in zip(whole, batch.lengths, strict=True)]
            )
            return output.sum(), torch.tensor(1, dtype=torch.int), torch.cat(list(rows))

        return output, collect

    with torch.no_grad():
        results = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter([0]),
            model=scorer.model,
            num_microbatches=1,
            seq_length=1,
            micro_batch_size=1,
            forward_only=True,
        )
    return results[0] if parallel.is_last_stage else None


def exported(config: RunConfig) -> dict[str, torch.Tensor]:
    """The weights as the export gives them back."""
    return {name: tensor.clone() for name, tensor in ScoringModel(config, world(config), config.model.path).export()}


def run_training(config: RunConfig, resume: str = "auto") -> None:
    """The whole loop."""
    run_in(config, resume, world(config))


def batch_of(parallel: ParallelContext) -> TrainBatch:
    """The toy sequences as one update in two micro-batches, the same on every data-parallel rank."""
    found = sequences()
    return TrainBatch(
        sequences=found,
        updates=[UpdatePlan(micro_batches=[[0, 1], [2, 3]], num_tokens=50 * parallel.dp_size, num_sequences=4)],
        global_index=list(range(len(found))),
        rewards=torch.zeros(4),
        groups=torch.zeros(4, dtype=torch.int64),
        advantages=torch.zeros(4),
    )


def checkpoint_round_trip(config: RunConfig, folder: str, *, save: bool) -> tuple[list[float], list[float]]:
    """Two updates, a checkpoint (or the one that is there), three more: gradient norms of those three."""
    parallel = world(config)
    first: list[float] = []
    if save:
        policy = Policy(config, parallel)
        for _ in range(2):
            policy.update(batch_of(parallel))
        if parallel.is_main:
            Path(folder).mkdir(parents=True)
        dist.barrier()
        save_policy(policy, Path(folder))
        first = [_norm(policy, parallel) for _ in range(3)]
    resumed = Policy(config, parallel)
    load_policy(resumed, Path(folder))
    return first, [_norm(resumed, parallel) for _ in range(3)]


def round_trip_without_counting_gaps(config: RunConfig, folder: str) -> tuple[list[float], list[float]]:
    """``checkpoint_round_trip`` with one patch taken away."""
    count_gaps = patches.count_gaps
    patches.count_gaps = lambda model: None
    try:
        return checkpoint_round_trip(config, folder, save=True)
    finally:
        patches.count_gaps = count_gaps


def diverge(config: RunConfig) -> tuple[str, bool]:
    """An update with an infinite advantage: what every rank raises, and whether its weights stayed."""
    parallel = world(config)
    policy = Policy(config, parallel)
    before = [p.detach().clone() for p in policy.model.parameters()]
    batch = batch_of(parallel)
    bad = [replace(s, advantages=torch.full_like(s.advantages, float("inf"))) for s in batch.sequences]
    try:
        policy.update(replace(batch, sequences=bad))
    except Exception as error:
        same = all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))
        return f"{type(error).__name__}: {error}", same
    return "nothing", False


def update_without_tokens_here(config: RunConfig) -> float:
    """An update in which only the first data-parallel rank has tokens with loss: its gradient norm."""
    parallel = world(config)
    batch = batch_of(parallel)
    if parallel.dp_rank > 0:
        masked = [replace(s, loss_mask=torch.zeros_like(s.loss_mask)) for s in batch.sequences]
        batch = replace(batch, sequences=masked)
    return Policy(config, parallel).update(batch)["actor/grad_norm"].result()


def _norm(policy: Policy, parallel: ParallelContext) -> float:
    return policy.update(batch_of(parallel))["actor/grad_norm"].result()
