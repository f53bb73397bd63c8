"""Functions that the ranks of a gang run; the tests call them and compare their results."""

import contextlib
import gc
import io
import itertools
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_rl.algorithms.importance import build_correction
from megatron_rl.batching.batch import given_batch, make_batch
from megatron_rl.batching.reward_model import labelled_sequence
from megatron_rl.config import RunConfig
from megatron_rl.config.parallel import ParallelSection
from megatron_rl.config.reward_training import RewardTrainingConfig
from megatron_rl.distributed.collectives import gather_objects
from megatron_rl.errors import WeightSyncError
from megatron_rl.mcore.checkpoint import begin_save, complete_save, load_learner, save_learner
from megatron_rl.mcore.critic import Critic
from megatron_rl.mcore.logprob_model import LogProbModel
from megatron_rl.mcore.model.gpt_model import PolicyModel, place_of
from megatron_rl.mcore.policy import Policy
from megatron_rl.mcore.reference import HostReference
from megatron_rl.mcore.reward_model import RewardModel
from megatron_rl.mcore.runtime import event_loop, patches
from megatron_rl.mcore.runtime.parallel import build_another_layout, build_layout
from megatron_rl.metrics.metric import merge, results
from megatron_rl.models import layout_table
from megatron_rl.models.engine_shards import engine_boxes
from megatron_rl.rollout.collector import Job
from megatron_rl.rollout.engines.base import Request
from megatron_rl.rollout.engines.embedded import EmbeddedEngine
from megatron_rl.rollout.engines.sampling import sample_seed
from megatron_rl.rollout.load_balancing import share
from megatron_rl.rollout.partial import begin_group
from megatron_rl.trainer import reward_model_trainer as reward_training
from megatron_rl.trainer.advantages import compute_advantages
from megatron_rl.trainer.build import build_collector, build_engine, build_supervisor
from megatron_rl.trainer.experience import compute_old_logprobs
from megatron_rl.trainer.inputs import read_inputs
from megatron_rl.trainer.rollout_correction import correct_rollout
from megatron_rl.trainer.setup import run_in_world
from megatron_rl.types import (
    Completion,
    ParallelContext,
    Prompt,
    Rollout,
    RolloutGroup,
    SamplingParams,
    TrainBatch,
    TrainSequence,
    TrainState,
)
from megatron_rl.weight_sync import WeightSync
from megatron_rl.weight_sync.host_memory import PeerAccess
from megatron_rl.weight_sync.plan import plan_reshard
from megatron_rl.weight_sync.push import policy_logprobs
from megatron_rl.weight_sync.transfer import Traffic, Transfer
from megatron_rl.weights.layout import Place, hf_shapes
from megatron_rl.weights.peft_files import write_peft_folder
from tests.engines.contract import DyingEngine
from tests.toys import VOCAB, sequences
from tools.data import best_of_n

# after megatron_rl.mcore, which prepares Megatron-Core for the CPU
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedObject  # isort: skip

_worlds: dict[ParallelSection, ParallelContext] = {}
_counters = itertools.count()
KEPT_WORLDS = 3


def world(config: RunConfig | RewardTrainingConfig) -> ParallelContext:
    """Return the parallel context of a layout of this gang, with a part of the store of its own.

    Megatron never destroys a process group, and every group has threads. The last few layouts are therefore kept, and
    Megatron's global state is set to that of the returned one; the groups of older layouts are destroyed.
    """
    key = replace(
        config.parallel, distributed_optimizer=True, overlap_grad_reduce=False, overlap_param_gather=False
    )  # options that do not change the groups
    store = dist.PrefixStore(f"world{next(_counters)}", distributed_c10d._get_default_store())
    if key not in _worlds:
        if len(_worlds) == KEPT_WORLDS:
            _close(_worlds.pop(next(iter(_worlds))))
        context = build_layout(config.parallel, store, 0, torch.device("cpu"))
        _worlds[key] = context
    context = _worlds[key]
    for name, value in context.record.items():
        setattr(parallel_state, name, value)
    return replace(context, store=store)


def _close(context: ParallelContext) -> None:
    """Destroy every group of a layout."""
    groups = [context.host_group]
    for value in context.record.values():
        groups += value if isinstance(value, list) else [value]
    gc.collect()  # frees models that hold groups
    for group in {
        id(candidate): candidate for candidate in groups if isinstance(candidate, dist.ProcessGroup)
    }.values():
        if group is not dist.group.WORLD and group in distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)


def logits(config: RunConfig, checkpoint: str | None = None) -> torch.Tensor | None:
    """Return the logits of the toy sequences over the whole vocabulary on the last stage, else None.

    Args:
        checkpoint: folder from which Megatron itself loads the weights; None: those of ``model.path``.
    """
    parallel = world(config)
    model = LogProbModel(config, parallel, config.model.path)
    if checkpoint is not None:
        for parameter in model.parameters.values():
            parameter.data.fill_(float("nan"))
        loaded = dist_checkpointing.load(_sharded(model), checkpoint)
        for key, chunk in zip(_sharded(model), model.chunks, strict=True):
            chunk.load_state_dict(loaded[key])
    captured = []

    class CapturingModel(PolicyModel):
        """Also captures the logits from which log-probabilities are computed."""

        def logprobs(self, hidden: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, **_: Any) -> Any:
            rows = hidden.transpose(0, 1)
            if self.config.sequence_parallel:
                rows = tensor_parallel.gather_from_sequence_parallel_region(rows.contiguous())
            shard = rows.transpose(0, 1) @ self.output_weight().t()
            captured.append(tensor_parallel.gather_from_tensor_model_parallel_region(shard)[..., :VOCAB])
            return super().logprobs(hidden, labels, mask, **_)

    for chunk in model.chunks:
        chunk.__class__ = CapturingModel
    rows = sequences()
    model.logprobs(batch_of([0, 1, 2, 3]))
    if not parallel.is_last_stage:
        return None
    (padded,) = captured
    lengths = [row.token_ids.numel() for row in rows]
    if config.batching.packed:
        return torch.cat(list(padded[0].split([*lengths, padded.size(1) - sum(lengths)])[:-1]))
    return torch.cat([row[:length] for row, length in zip(padded, lengths, strict=True)])


def _sharded(model: LogProbModel, **metadata: bool) -> dict[str, Any]:
    """Return the sharded state dicts of a model under the keys that Megatron-LM gives them."""
    names = [f"model{index}" for index in range(len(model.chunks))] if len(model.chunks) > 1 else ["model"]
    return {
        name: chunk.sharded_state_dict(metadata=metadata or None)
        for name, chunk in zip(names, model.chunks, strict=True)
    }


def save_as_megatron_lm(config: RunConfig, folder: str, **metadata: bool) -> None:
    """Save a checkpoint of the model without an optimizer, as Megatron-LM writes it after iteration 10.

    Args:
        metadata: options of ``sharded_state_dict`` that choose how layers, experts and gates are stored.
    """
    parallel = world(config)
    model = LogProbModel(config, parallel, config.model.path)
    target = Path(folder) / "iter_0000010"
    if parallel.is_main:
        target.mkdir(parents=True)
        (target.parent / "latest_checkpointed_iteration.txt").write_text("10")
    dist.barrier()
    others = {"checkpoint_version": 3.0, "iteration": 10, "args": None, "rng_state": _random_state(parallel)}
    dist_checkpointing.save({**_sharded(model, **metadata), **others}, str(target))


def _random_state(parallel: ParallelContext) -> ShardedObject:
    """Return this rank's random state as Megatron-LM saves it."""
    shape, offset = (parallel.world_size,), (parallel.rank,)
    return ShardedObject("rng_state", [{"random": torch.get_rng_state()}], shape, offset, replica_id=0)


def rank_parameters(config: RunConfig) -> tuple[list[str], Place]:
    """Return the names of this rank's parameters and its place in the layout."""
    parallel = world(config)
    return list(LogProbModel(config, parallel, config.model.path).parameters), place_of(parallel)


def run_transfer(
    config: RunConfig, engine_tp: int, nodes: list[int], bucket_elements: int, peer_access: PeerAccess
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Return the tensors that a planned transfer delivers to this rank, and its traffic in bytes.

    Keys of the traffic: received, sent, planned (to be received), planned to send, least (that must be received) and
    peak (of the buffers).
    """
    parallel = world(config)
    model = LogProbModel(config, parallel, config.model.path)
    table = layout_table(model.spec, parallel.tp_size)
    shapes = hf_shapes(table)
    held = gather_objects((list(model.parameters), place_of(parallel)), parallel)
    boxes = [
        engine_boxes(model.spec, shapes, tp_rank=rank % engine_tp, tp_size=engine_tp)
        for rank in range(parallel.world_size)
    ]
    plan = plan_reshard(held, table, boxes, nodes, bucket_elements=bucket_elements)
    traffic = Traffic()
    transfer = Transfer(plan, parallel.rank, peer_access=peer_access)
    tensors = {name: tensor.clone() for name, tensor in transfer.stream(model.shards(), traffic)}
    return tensors, {
        "received": traffic.bytes_received,
        "sent": traffic.bytes_sent,
        "planned": 4 * plan.num_received(parallel.rank),
        "planned to send": 4 * plan.num_sent(parallel.rank),
        "least": 4 * plan.minimum(parallel.rank),
        "peak": traffic.peak_buffer_bytes,
    }


def push_twice(config: RunConfig) -> list[dict[str, float]]:
    """Return the metrics of a first push and of one after an update, to the embedded engine, with checks and probe."""
    parallel = world(config)
    policy = Policy(config, parallel)
    sync = WeightSync(policy, build_engine(config, policy), config)
    first = sync.push(0)
    policy.update(batch_of())
    second = sync.push(1)
    assert sync.push(1) == {}
    return [{name: value.result() for name, value in metrics.items()} for metrics in (first, second)]


def engine_and_policy_logprobs(config: RunConfig, num_updates: int) -> list[tuple[Completion, torch.Tensor]]:
    """Return completions of all engines before and after each of some updates.

    Every completion comes with the policy's log-probabilities of its tokens, [R].
    """
    parallel = world(config)
    policy = Policy(config, parallel)
    key = f"{config.model.path} {config.rollout}"
    if key not in _engines:
        for other in list(_engines):
            _engines.pop(other).close()
        _engines[key] = build_engine(config, policy)
    engine = _engines[key]
    sync = WeightSync(policy, engine, config)
    results: list[tuple[Completion, torch.Tensor]] = []
    for version in range(num_updates + 1):
        if version:
            policy.update(batch_of())
        engine._version = -1  # an engine kept from an earlier call may already have this version
        sync.push(version)
        params = SamplingParams(temperature=0.8, top_p=1.0, top_k=0, max_new_tokens=12, stop_token_ids=(1,))
        requests = [
            Request(key=key, token_ids=torch.arange(3 + key), seeds=(sample_seed(version, key, 0), 5))
            for key in range(6)
        ]
        own_requests = share(requests, "static", "", engine.place, None)
        finished = list(engine.generate(own_requests, params, max_requests=4))
        all_finished = [result for part in gather_objects(finished, parallel) for result in part]
        assert len(all_finished) == 12
        assert {result.completion.policy_version for result in all_finished} == {version}
        rows = policy_logprobs(
            policy, [(requests[result.key].token_ids, result.completion.token_ids) for result in all_finished]
        )
        results += [(result.completion, row) for result, row in zip(all_finished, rows, strict=True)]
    return results


def collect_despite_engine_deaths(config: RunConfig) -> tuple[list[list[int]], list[list[int]], int]:
    """Return the tokens of a job without failures, those of the same job with failures, and the number of failures.

    The engine of the first rank dies during the second job, and again in the push that follows. The policy is offloaded
    during a job, as it is in a run.
    """
    parallel = world(config)
    policy = Policy(config, parallel)
    engine: Any = DyingEngine(build_engine(config, policy), config.rollout.engine, deaths=0)
    supervisor = build_supervisor(config, engine, policy)
    collector = build_collector(config, read_inputs(config, parallel), supervisor, policy)
    greedy = config.rollout.engine == "sglang"  # SGLang has no seed per sample
    params = SamplingParams(
        temperature=0.0 if greedy else 1.0, top_p=1.0, top_k=0, max_new_tokens=12, stop_token_ids=()
    )
    prompts = [Prompt(prompt_id=str(i), token_ids=torch.arange(3 + i % 3), text="", answer="1") for i in range(12)]
    work = [begin_group(prompt, [sample_seed(i, k) for k in range(2)]) for i, prompt in enumerate(prompts)]
    tokens = []
    with closing(engine), closing(collector):
        supervisor.push(0)
        for name, deaths in (("undisturbed", 0), ("disturbed", 1)):
            engine.deaths_left = engine.push_deaths_left = deaths if parallel.rank == 0 else 0
            job = Job(name=name, groups=work, params=params, schedule="static", functions="train", version=0)
            policy.learner.to_host()
            finished = collector.collect(job)
            policy.learner.to_device()
            assert engine.version == 0
            tokens.append([sample.token_ids.tolist() for group in finished for sample in group.as_group(0).rollouts])
        return tokens[0], tokens[1], supervisor.num_failures


_engines: dict[str, Any] = {}


class FaultyEngine(EmbeddedEngine):
    """Embedded engine whose pushes fail in the way that ``fault`` names."""

    fault = ""

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        if self.fault == "refused by the engine":
            next(tensors)
            raise WeightSyncError("no room")
        received = list(tensors)
        if self.fault == "lost by the engine":
            received = [(name, torch.zeros_like(x) if "k_proj" in name else x) for name, x in received]
        super().load_weights(iter(received), version if self.fault != "stale version" else 0)


class FaultyTransfer(Transfer):
    """Transfer that delivers two tensors in reversed order."""

    def stream(self, parameters: Any, traffic: Traffic) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in super().stream(parameters, traffic):
            yield name, tensor.flip(0) if name in ("model.norm.weight", "lm_head.weight") else tensor


def failed_push(config: RunConfig) -> str:
    """Return the error of a first push that cannot succeed; empty if it does."""
    parallel = world(config)
    policy = Policy(config, parallel)
    try:
        WeightSync(policy, build_engine(config, policy), config).push(0)
    except WeightSyncError as error:
        return str(error)
    return ""


def faulty_push(config: RunConfig, fault: str, *, is_first: bool = False) -> str | None:
    """Return the error of a push in which rank 1's engine or transfer has a fault; None without an error.

    Args:
        is_first: the fault is in the first push of the run; otherwise one without it comes first.
    """
    parallel = world(config)
    policy = Policy(config, parallel)
    engine: Any = build_engine(config, policy)
    sync = WeightSync(policy, engine, config)
    if not is_first:
        sync.push(0)
    if parallel.rank == 1:
        engine.__class__, engine.fault = FaultyEngine, fault
        if fault == "changed on the way":
            sync._transfer.__class__ = FaultyTransfer
    try:
        sync.push(1)
    except WeightSyncError as error:
        return str(error)
    return None


def exported_weights(config: RunConfig) -> dict[str, torch.Tensor]:
    """Return the weights as the policy exports them."""
    return {name: tensor.clone() for name, tensor in LogProbModel(config, world(config), config.model.path).export()}


def train_reward_model(config: RewardTrainingConfig, resume: str = "auto") -> None:
    """Train a reward model."""
    reward_training.run_in_world(config, resume, world(config))


def reward_scores(config: RewardTrainingConfig, samples: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
    """Return the scores of token sequences.

    Args:
        samples: token ids of each sequence, and the positions of the tokens to score.
    """
    model = RewardModel(config.as_run(), world(config))
    return model.scores([labelled_sequence(tokens, positions) for tokens, positions in samples])


def choose_best(config: RewardTrainingConfig, arguments: list[str]) -> str:
    """Return the output of tools/data/best_of_n.py."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        best_of_n.choose(best_of_n.parse_arguments(arguments), config, world(config))
    return printed.getvalue()


def run_training(config: RunConfig, resume: str = "auto") -> None:
    """Run a whole training, with the random state of a new process."""
    parallel = world(config)
    torch.manual_seed(0)
    run_in_world(config, resume, parallel)


def batch_of(*micro_batches: list[int]) -> TrainBatch:
    """Return the toy sequences as one update, by default in two micro-batches; equal on all data-parallel ranks."""
    return given_batch(sequences(), micro_batches or ([0, 1], [2, 3]))


LENGTHS = (9, 17, 6, 30, 12, 21, 8, 3)


@dataclass(frozen=True)
class Outcome:
    """Metrics and weights of a policy after some updates."""

    losses: list[float]
    norms: list[float]
    balance: list[float]
    """Router losses, if the model has them."""
    corrections: dict[str, float]
    """Metrics of the rollout correction; empty without log-probabilities of an engine."""
    logprobs: dict[int, torch.Tensor]
    """Log-probabilities before the first update, by index of the sequence in the step."""
    weights: dict[str, torch.Tensor]


def run_updates(config: RunConfig, engine_logprobs: dict[int, torch.Tensor] | None = None) -> Outcome:
    """Compute log-probabilities of the toy sequences, and train on them in two pairs of updates.

    The sequences are distributed over the data-parallel ranks.

    Args:
        engine_logprobs: log-probabilities of the engine, by index of the sequence; if given, the old log-probabilities
            are computed by the policy and the rollout correction is applied.
    """
    parallel = world(config)
    policy = Policy(config, parallel)
    inputs, corrections = sequences(LENGTHS), {}
    if engine_logprobs is not None:
        inputs = [replace(s, rollout_logprobs=engine_logprobs[index]) for index, s in enumerate(inputs)]
    batch = plan_batch(inputs, config, parallel)
    rows = policy.logprobs(batch)
    if engine_logprobs is not None:
        correction = build_correction(config.algorithm)
        batch, corrected = correct_rollout(compute_old_logprobs(batch, policy), correction)
        corrections = results(merge(gather_objects(corrected, parallel)))
    repeated = replace(batch, updates=[*batch.updates, *batch.updates])  # two updates, so that ratios differ from 1
    losses, norms, balance = [], [], []
    for _ in range(2):
        policy.learner.to_host()
        policy.learner.to_device()
        metrics = results(merge(gather_objects(policy.update(repeated), parallel)))
        losses.append(metrics["actor/loss"])
        norms.append(metrics["actor/grad_norm"])
        balance += [metrics[name] for name in ("moe/aux_loss", "moe/z_loss") if name in metrics]
    return Outcome(
        losses=losses,
        norms=norms,
        balance=balance,
        corrections=corrections,
        logprobs={i: row for i, row in zip(batch.global_index, rows, strict=True) if i >= 0},
        weights={name: tensor.clone() for name, tensor in policy.export()},
    )


def advantages_by_index(config: RunConfig, rewards: list[float]) -> tuple[dict[int, torch.Tensor], dict[str, float]]:
    """Return the advantages of the response tokens by index of the sequence in the step, and the metrics."""
    parallel = world(config)
    batch = replace(plan_batch(sequences(LENGTHS), config, parallel), rewards=torch.tensor(rewards))
    batch, metrics = compute_advantages(batch, config.algorithm, parallel, TrainState())
    rows = {i: s.advantages[s.loss_mask] for i, s in zip(batch.global_index, batch.sequences, strict=True) if i >= 0}
    return rows, results(merge(gather_objects(metrics, parallel)))


def replay_routing(config: RunConfig) -> tuple[dict[int, torch.Tensor], float]:
    """Compute log-probabilities along random expert routes.

    Returns:
        The log-probabilities by index of the sequence in the step, and their largest distance from those without
        replay.
    """
    parallel = world(config)
    policy = LogProbModel(config, parallel, config.model.path)
    moe = policy.spec.moe
    assert moe is not None
    inputs = []
    for index, sequence in enumerate(sequences()):
        generator = torch.Generator().manual_seed(index)
        scores = torch.rand(sequence.token_ids.numel(), policy.spec.num_layers, moe.num_experts, generator=generator)
        inputs.append(replace(sequence, routing=scores.topk(moe.experts_per_token).indices.to(torch.int16)))
    batch = plan_batch(inputs, config, parallel)
    rows = policy.logprobs(batch, replay_routing=True)
    without_replay = policy.logprobs(batch)
    distance = max(float((a - b).abs().max()) for a, b in zip(rows, without_replay, strict=True))
    return {i: row for i, row in zip(batch.global_index, rows, strict=True) if i >= 0}, distance


@dataclass(frozen=True)
class OffloadedBytes:
    """Bytes of a policy that is moved to the host."""

    freed_bytes: int
    held_bytes: int
    """Of weights, gradients and optimizer states before the move."""
    left_bytes: int
    """Of the same storages while the policy is on the host."""


def offload(config: RunConfig) -> OffloadedBytes:
    """Move parts of a policy to the host and back, and count bytes."""
    policy = Policy(config, world(config))
    policy.update(batch_of())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in _tensors_of(policy)}
    held = sum(storage.nbytes() for storage in storages.values())
    freed = policy.learner.to_host()
    left = sum(storage.nbytes() for storage in storages.values())
    policy.learner.to_device()
    return OffloadedBytes(freed_bytes=freed, held_bytes=held, left_bytes=left)


def _tensors_of(policy: Policy) -> Iterator[torch.Tensor]:
    yield from policy.parameters.values()
    for chunk in policy.learner.ddp:
        yield from (buffer.grad_data for buffer in chunk.buffers)
    for inner in patches.inner_optimizers(policy.learner.optimizer):
        for group in inner.optimizer.param_groups:
            yield from group["params"]
        for state in inner.optimizer.state.values():
            yield from (value for value in state.values() if value.ndim)


def compare_hosted_reference(config: RunConfig, path: str) -> tuple[bool, float, bool]:
    """Compare a hosted reference with a separate model of the same weights.

    Returns:
        Whether their log-probabilities are bit-equal, the largest distance of the policy's from the reference's, and
        whether the policy's weights are restored bit for bit.
    """
    parallel = world(config)
    policy, batch = Policy(config, parallel), batch_of()
    policy.update(batch)
    before, weights = policy.logprobs(batch), [p.detach().clone() for p in policy.parameters.values()]
    hosted = HostReference(policy, path).logprobs(batch)
    alone = LogProbModel(config, parallel, path).logprobs(batch)
    same = all(torch.equal(a, b) for a, b in zip(hosted, alone, strict=True))
    distance = max(float((a - b).abs().max()) for a, b in zip(hosted, before, strict=True))
    restored = all(torch.equal(a, b) for a, b in zip(weights, policy.parameters.values(), strict=True))
    return same, distance, restored


def plan_batch(inputs: list[TrainSequence], config: RunConfig, parallel: ParallelContext) -> TrainBatch:
    """Return the sequences as one update, distributed over ranks and micro-batches as in training."""
    rollouts = [
        Rollout(
            token_ids=s.token_ids,
            loss_mask=s.loss_mask,
            rollout_logprobs=s.rollout_logprobs,
            text="",
            finish_reason="stop",
            policy_versions=torch.zeros_like(s.token_ids).int(),
            seed=0,
            reward=0.0,
            reward_parts={},
            status="ok",
            failure="",
            routing=s.routing,
        )
        for s in inputs
    ]
    prompt = Prompt(prompt_id="0", token_ids=inputs[0].token_ids[:3], text="", answer=None)
    batch = make_batch([RolloutGroup(index=0, prompt=prompt, rollouts=rollouts)], config, parallel)
    completed = [
        replace(
            s, advantages=inputs[i].advantages, old_logprobs=inputs[i].old_logprobs, ref_logprobs=inputs[i].ref_logprobs
        )
        if i >= 0
        else s
        for s, i in zip(batch.sequences, batch.global_index, strict=True)
    ]
    return replace(batch, sequences=completed)


def checkpoint_round_trip(config: RunConfig, folder: str, *, save: bool) -> tuple[list[float], list[float]]:
    """Return the gradient norms of three updates after a checkpoint, without a restart and after a resume.

    With ``save``, two updates and the checkpoint come first. Otherwise the checkpoint in ``folder`` is resumed, and the
    first list is empty.
    """
    parallel = world(config)
    continued: list[float] = []
    if save:
        policy = Policy(config, parallel)
        for _ in range(2):
            policy.update(batch_of())
        if parallel.is_main:
            Path(folder).mkdir(parents=True)
        dist.barrier()
        save_learner(policy.learner, Path(folder))
        continued = [_norm(policy) for _ in range(3)]
    resumed = Policy(config, parallel)
    load_learner(resumed.learner, Path(folder))
    return continued, [_norm(resumed) for _ in range(3)]


def train_and_save(config: RunConfig, folder: str) -> dict[str, torch.Tensor]:
    """Run an update, save a checkpoint and return the exported weights."""
    parallel = world(config)
    policy = Policy(config, parallel)
    policy.update(batch_of())
    if parallel.is_main:
        Path(folder).mkdir(parents=True)
    dist.barrier()
    save_learner(policy.learner, Path(folder))
    return {name: tensor.clone() for name, tensor in policy.export()}


def save_both_ways(config: RunConfig, folder: str) -> None:
    """Save the same state synchronously and in the background, with an update while the latter is written."""
    parallel = world(config)
    policy = Policy(config, parallel)
    policy.update(batch_of())
    now, later = Path(folder) / "now", Path(folder) / "later"
    if parallel.is_main:
        now.mkdir(parents=True)
        later.mkdir()
    dist.barrier()
    save_learner(policy.learner, now)
    pending = begin_save(policy.learner, later, on_written=lambda: None)
    policy.update(batch_of())
    pending.wait()
    complete_save(pending, later)


def round_trip_without_bucket_padding(config: RunConfig, folder: str) -> tuple[list[float], list[float]]:
    """Run ``checkpoint_round_trip`` without the patch ``include_bucket_padding``."""
    include_bucket_padding = patches.include_bucket_padding
    patches.include_bucket_padding = lambda model: None
    try:
        return checkpoint_round_trip(config, folder, save=True)
    finally:
        patches.include_bucket_padding = include_bucket_padding


def diverge(config: RunConfig) -> tuple[str, bool]:
    """Return the error of an update with an infinite advantage, and whether the weights are unchanged."""
    parallel = world(config)
    policy = Policy(config, parallel)
    before = [p.detach().clone() for p in policy.parameters.values()]
    batch = batch_of()
    bad = [replace(s, advantages=torch.full_like(s.advantages, float("inf"))) for s in batch.sequences]
    try:
        policy.update(replace(batch, sequences=bad))
    except Exception as error:
        unchanged = all(torch.equal(a, b) for a, b in zip(before, policy.parameters.values(), strict=True))
        return f"{type(error).__name__}: {error}", unchanged
    return "nothing", False


def update_with_tokens_on_first_rank_only(config: RunConfig) -> float:
    """Return the gradient norm of an update in which only the first data-parallel rank has tokens with loss."""
    parallel = world(config)
    batch = batch_of()
    if parallel.dp_rank > 0:
        masked = [replace(s, loss_mask=torch.zeros_like(s.loss_mask)) for s in batch.sequences]
        batch = replace(batch, sequences=masked)
    return Policy(config, parallel).update(batch)["actor/grad_norm"].result()


def _norm(policy: Policy) -> float:
    return policy.update(batch_of())["actor/grad_norm"].result()


def threads_added_by_groups(num_groups: int) -> tuple[int, int]:
    """Return how many threads ``num_groups`` groups of this project, and of torch's own, add to the process."""
    grown, made = [], []
    for kind in (event_loop.SharingGroup, event_loop._Gloo):
        distributed_c10d.ProcessGroupGloo = kind
        made.append(dist.new_group(backend="gloo"))  # the first group starts the threads that all share
        before = len(os.listdir("/proc/self/task"))
        made += [dist.new_group(backend="gloo") for _ in range(num_groups)]
        grown.append(len(os.listdir("/proc/self/task")) - before)
    distributed_c10d.ProcessGroupGloo = event_loop.SharingGroup
    for group in made:
        dist.destroy_process_group(group)
    return grown[0], grown[1]


@dataclass(frozen=True)
class AdapterOutcome:
    """A policy with adapters after updates."""

    logprobs: dict[int, torch.Tensor]
    """Log-probabilities after the updates, by index of the sequence."""
    base_logprobs: dict[int, torch.Tensor]
    """The same with the adapters disabled."""
    adapters: dict[str, torch.Tensor]
    merged: dict[str, torch.Tensor]
    frozen_changed: bool
    """Whether a weight of the model itself changed."""
    norms: list[float]
    trainable_bytes: int
    """Bytes of gradients and optimizer states on this rank."""


def update_with_adapters(config: RunConfig, folder: str | None = None) -> AdapterOutcome:
    """Run two updates of a policy with or without adapters; write a PEFT folder if ``folder`` is given."""
    parallel = world(config)
    policy = Policy(config, parallel)
    before = {name: parameter.detach().clone() for name, parameter in policy.parameters.items()}
    batch = plan_batch(sequences(LENGTHS), config, parallel)
    twice = replace(batch, updates=[*batch.updates, *batch.updates])
    norms = [results(policy.update(twice))["actor/grad_norm"] for _ in range(2)]
    with policy.without_adapters():
        base_rows = policy.logprobs(batch)
    rows, held = policy.logprobs(batch), policy.learner.memory()
    adapters = {} if policy.adapters is None else {name: x.clone() for name, x in policy.adapters.export()}
    if folder is not None and parallel.is_main:
        section = config.lora
        write_peft_folder(
            Path(folder),
            adapters.items(),
            base=config.model.path,
            rank=section.rank,
            alpha=section.alpha,
            targets=section.targets,
        )
    return AdapterOutcome(
        logprobs={i: row for i, row in zip(batch.global_index, rows, strict=True) if i >= 0},
        base_logprobs={i: row for i, row in zip(batch.global_index, base_rows, strict=True) if i >= 0},
        adapters=adapters,
        merged={name: tensor.clone() for name, tensor in policy.export()},
        frozen_changed=any(not torch.equal(before[name], x) for name, x in policy.parameters.items()),
        norms=norms,
        trainable_bytes=held["grads"] + held["optimizer"],
    )


def initial_weights(config: RunConfig) -> dict[str, torch.Tensor]:
    """Return the weights that a new policy exports."""
    return {name: tensor.clone() for name, tensor in Policy(config, world(config)).export()}


def initial_logprobs(config: RunConfig) -> dict[int, torch.Tensor]:
    """Return a new policy's log-probabilities of the toy sequences, by index of the sequence."""
    parallel = world(config)
    batch = plan_batch(sequences(LENGTHS), config, parallel)
    rows = Policy(config, parallel).logprobs(batch)
    return {i: row for i, row in zip(batch.global_index, rows, strict=True) if i >= 0}


def initial_values(config: RunConfig) -> dict[int, torch.Tensor]:
    """Return a new critic's values before each token of the toy sequences, by index of the sequence."""
    parallel = world(config)
    own = config.for_critic()
    critic = Critic(own, build_another_layout(own.parallel, parallel))
    batch = plan_batch(sequences(LENGTHS), own, critic.parallel)
    return {i: row for i, row in zip(batch.global_index, critic.values(batch), strict=True) if i >= 0}
