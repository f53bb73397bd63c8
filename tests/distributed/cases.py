"""What the ranks of a gang run; the tests around them compare."""

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
from tests.engines.contract import Dying
from tests.toys import VOCAB, sequences
from tools.data import best_of_n

# after megatron_rl.mcore, which prepares Megatron-Core for the CPU
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedObject  # isort: skip

_worlds: dict[ParallelSection, ParallelContext] = {}
_counters = itertools.count()
KEPT_WORLDS = 3


def world(config: RunConfig | RewardTrainingConfig) -> ParallelContext:
    """A split of this gang, with counters of its own.

    Megatron never closes a group, and every one has threads; so the last few splits are kept, with
    Megatron's record of each to be put back, and the groups of the others are closed here.
    """
    key = replace(
        config.parallel, distributed_optimizer=True, overlap_grad_reduce=False, overlap_param_gather=False
    )  # which do not change the groups
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
    """Destroy every group of a split."""
    found = [context.host_group]
    for value in context.record.values():
        found += value if isinstance(value, list) else [value]
    gc.collect()  # models that hold groups
    for group in {id(one): one for one in found if isinstance(one, dist.ProcessGroup)}.values():
        if group is not dist.group.WORLD and group in distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)


def logits(config: RunConfig, checkpoint: str | None = None) -> torch.Tensor | None:
    """Whole-vocabulary logits of the toy sequences, on the last stage.

    Args:
        checkpoint: folder from which Megatron itself reads the weights.
    """
    parallel = world(config)
    scorer = LogProbModel(config, parallel, config.model.path)
    if checkpoint is not None:
        for parameter in scorer.parameters.values():
            parameter.data.fill_(float("nan"))
        loaded = dist_checkpointing.load(_sharded(scorer), checkpoint)
        for key, chunk in zip(_sharded(scorer), scorer.chunks, strict=True):
            chunk.load_state_dict(loaded[key])
    found = []

    class Catching(PolicyModel):
        """Keeps the logits instead of taking log-probabilities."""

        def logprobs(self, hidden: torch.Tensor, labels: torch.Tensor, wanted: torch.Tensor, **_: Any) -> Any:
            rows = hidden.transpose(0, 1)
            if self.config.sequence_parallel:
                rows = tensor_parallel.gather_from_sequence_parallel_region(rows.contiguous())
            shard = rows.transpose(0, 1) @ self.output_weight().t()
            found.append(tensor_parallel.gather_from_tensor_model_parallel_region(shard)[..., :VOCAB])
            return super().logprobs(hidden, labels, wanted, **_)

    for chunk in scorer.chunks:
        chunk.__class__ = Catching
    rows = sequences()
    scorer.logprobs(batch_of([0, 1, 2, 3]))
    if not parallel.is_last_stage:
        return None
    (whole,) = found
    lengths = [row.token_ids.numel() for row in rows]
    if config.batching.packed:
        return torch.cat(list(whole[0].split([*lengths, whole.size(1) - sum(lengths)])[:-1]))
    return torch.cat([row[:length] for row, length in zip(whole, lengths, strict=True)])


def _sharded(scorer: LogProbModel, **metadata: bool) -> dict[str, Any]:
    """What Megatron-LM saves and loads of a model."""
    names = [f"model{place}" for place in range(len(scorer.chunks))] if len(scorer.chunks) > 1 else ["model"]
    return {
        name: chunk.sharded_state_dict(metadata=metadata or None)
        for name, chunk in zip(names, scorer.chunks, strict=True)
    }


def save_as_megatron_lm(config: RunConfig, folder: str, **metadata: bool) -> None:
    """A checkpoint of the model alone, as Megatron-LM leaves it after iteration 10.

    Args:
        metadata: of ``sharded_state_dict``, which choose how layers, experts and gates are stored.
    """
    parallel = world(config)
    scorer = LogProbModel(config, parallel, config.model.path)
    target = Path(folder) / "iter_0000010"
    if parallel.is_main:
        target.mkdir(parents=True)
        (target.parent / "latest_checkpointed_iteration.txt").write_text("10")
    dist.barrier()
    others = {"checkpoint_version": 3.0, "iteration": 10, "args": None, "rng_state": _random_state(parallel)}
    dist_checkpointing.save({**_sharded(scorer, **metadata), **others}, str(target))


def _random_state(parallel: ParallelContext) -> ShardedObject:
    """As Megatron-LM saves one for every rank."""
    shape, place = (parallel.world_size,), (parallel.rank,)
    return ShardedObject("rng_state", [{"random": torch.get_rng_state()}], shape, place, replica_id=0)


def held(config: RunConfig) -> tuple[list[str], Place]:
    """This rank's parameters and its place."""
    parallel = world(config)
    return list(LogProbModel(config, parallel, config.model.path).parameters), place_of(parallel)


def transferred(
    config: RunConfig, engine_tp: int, nodes: list[int], bucket_elements: int, peer_access: PeerAccess
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """What a planned transfer brings to this rank, and the bytes: received, sent, planned, least, peak."""
    parallel = world(config)
    scorer = LogProbModel(config, parallel, config.model.path)
    table = layout_table(scorer.spec, parallel.tp_size)
    shapes = hf_shapes(table)
    held = gather_objects((list(scorer.parameters), place_of(parallel)), parallel)
    wanted = [
        engine_boxes(scorer.spec, shapes, tp_rank=rank % engine_tp, tp_size=engine_tp)
        for rank in range(parallel.world_size)
    ]
    plan = plan_reshard(held, table, wanted, nodes, bucket_elements=bucket_elements)
    traffic = Traffic()
    transfer = Transfer(plan, parallel.rank, peer_access=peer_access)
    found = {name: tensor.clone() for name, tensor in transfer.stream(scorer.shards(), traffic)}
    return found, {
        "received": traffic.bytes_received,
        "sent": traffic.bytes_sent,
        "planned": 4 * plan.num_received(parallel.rank),
        "planned to send": 4 * plan.num_sent(parallel.rank),
        "least": 4 * plan.minimum(parallel.rank),
        "peak": traffic.peak_buffer_bytes,
    }


def pushed_twice(config: RunConfig) -> list[dict[str, float]]:
    """Metrics of a first push and of one after an update, on the embedded engine with checks and probe."""
    parallel = world(config)
    policy = Policy(config, parallel)
    sync = WeightSync(policy, build_engine(config, policy), config)
    first = sync.push(0)
    policy.update(batch_of())
    second = sync.push(1)
    assert sync.push(1) == {}
    return [{name: value.result() for name, value in found.items()} for found in (first, second)]


def engine_and_policy(config: RunConfig, num_updates: int) -> list[tuple[Completion, torch.Tensor]]:
    """Completions of this rank's engine after some updates, each with the policy's own log-probabilities."""
    parallel = world(config)
    policy = Policy(config, parallel)
    key = f"{config.model.path} {config.rollout}"
    if key not in _engines:
        for other in list(_engines):
            _engines.pop(other).close()
        _engines[key] = build_engine(config, policy)
    engine = _engines[key]
    sync = WeightSync(policy, engine, config)
    found: list[tuple[Completion, torch.Tensor]] = []
    for version in range(num_updates + 1):
        if version:
            policy.update(batch_of())
        engine._version = -1  # an engine of an earlier call may have the version already
        sync.push(version)
        params = SamplingParams(temperature=0.8, top_p=1.0, top_k=0, max_new_tokens=12, stop_token_ids=(1,))
        asked = [
            Request(key=key, token_ids=torch.arange(3 + key), seeds=(sample_seed(version, key, 0), 5))
            for key in range(6)
        ]
        mine = share(asked, "static", "", engine.place, None)
        done = list(engine.generate(mine, params, max_requests=4))
        everything = [one for part in gather_objects(done, parallel) for one in part]
        assert len(everything) == 12
        assert {one.completion.policy_version for one in everything} == {version}
        rows = policy_logprobs(policy, [(asked[one.key].token_ids, one.completion.token_ids) for one in everything])
        found += [(one.completion, row) for one, row in zip(everything, rows, strict=True)]
    return found


def collected_despite_deaths(config: RunConfig) -> tuple[list[list[int]], list[list[int]], int]:
    """Tokens of a job undisturbed, of the same job when the first engine dies in it, and how many engines died.

    It dies in the push after that as well.

    The policy is offloaded meanwhile, as it is in a run.
    """
    parallel = world(config)
    policy = Policy(config, parallel)
    engine: Any = Dying(build_engine(config, policy), config.rollout.engine, deaths=0)
    supervisor = build_supervisor(config, engine, policy)
    collector = build_collector(config, read_inputs(config, parallel), supervisor, policy)
    greedy = config.rollout.engine == "sglang"  # no seeds for each sample
    params = SamplingParams(
        temperature=0.0 if greedy else 1.0, top_p=1.0, top_k=0, max_new_tokens=12, stop_token_ids=()
    )
    prompts = [Prompt(prompt_id=str(i), token_ids=torch.arange(3 + i % 3), text="", answer="1") for i in range(12)]
    work = [begin_group(prompt, [sample_seed(i, k) for k in range(2)]) for i, prompt in enumerate(prompts)]
    found = []
    with closing(engine), closing(collector):
        supervisor.push(0)
        for name, deaths in (("undisturbed", 0), ("disturbed", 1)):
            engine.left = engine.left_in_pushes = deaths if parallel.rank == 0 else 0
            job = Job(name=name, groups=work, params=params, schedule="static", functions="train", version=0)
            policy.learner.to_host()
            done = collector.collect(job)
            policy.learner.to_device()
            assert engine.version == 0
            found.append([sample.token_ids.tolist() for group in done for sample in group.as_group(0).rollouts])
        return found[0], found[1], supervisor.num_failures


_engines: dict[str, Any] = {}


class FaultyEngine(EmbeddedEngine):
    """Spoils one push."""

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
    """Changes two tensors."""

    def stream(self, parameters: Any, traffic: Traffic) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in super().stream(parameters, traffic):
            yield name, tensor.flip(0) if name in ("model.norm.weight", "lm_head.weight") else tensor


def failed_push(config: RunConfig) -> str:
    """What every rank says of a first push that cannot be."""
    parallel = world(config)
    policy = Policy(config, parallel)
    try:
        WeightSync(policy, build_engine(config, policy), config).push(0)
    except WeightSyncError as error:
        return str(error)
    return ""


def faulty_push(config: RunConfig, fault: str) -> str | None:
    """What every rank says of a push that rank 1's engine or transfer spoils."""
    parallel = world(config)
    policy = Policy(config, parallel)
    engine: Any = build_engine(config, policy)
    sync = WeightSync(policy, engine, config)
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


def exported(config: RunConfig) -> dict[str, torch.Tensor]:
    """The weights as the export gives them back."""
    return {name: tensor.clone() for name, tensor in LogProbModel(config, world(config), config.model.path).export()}


def train_reward_model(config: RewardTrainingConfig, resume: str = "auto") -> None:
    """A reward model's training."""
    reward_training.run_in_world(config, resume, world(config))


def reward_scores(config: RewardTrainingConfig, asked: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
    """Scores of tokens at some of their places."""
    model = RewardModel(config.as_run(), world(config))
    return model.scores([labelled_sequence(tokens, places) for tokens, places in asked])


def choose_best(config: RewardTrainingConfig, arguments: list[str]) -> str:
    """What tools/data/best_of_n.py prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        best_of_n.choose(best_of_n.parse_arguments(arguments), config, world(config))
    return printed.getvalue()


def run_training(config: RunConfig, resume: str = "auto") -> None:
    """The whole loop."""
    run_in_world(config, resume, world(config))


def batch_of(*micro_batches: list[int]) -> TrainBatch:
    """The toy sequences as one update, in two micro-batches unless told, the same on every data-parallel rank."""
    return given_batch(sequences(), micro_batches or ([0, 1], [2, 3]))


LENGTHS = (9, 17, 6, 30, 12, 21, 8, 3)


@dataclass(frozen=True)
class Outcome:
    """What a policy is after some updates."""

    losses: list[float]
    norms: list[float]
    balance: list[float]
    """Router losses, of a mixture of experts that has them."""
    corrections: dict[str, float]
    """Metrics of the samples' corrections, where an engine sampled them."""
    logprobs: dict[int, torch.Tensor]
    """Place of a sequence in the step -> its log-probabilities before the first update."""
    weights: dict[str, torch.Tensor]


def some_updates(config: RunConfig, engine: dict[int, torch.Tensor] | None = None) -> Outcome:
    """Score and learn from the same sequences, shared out over the data-parallel ranks, in two pairs of updates.

    Args:
        engine: log-probabilities that an engine found, by place; the policy's own are then those before the update.
    """
    parallel = world(config)
    policy = Policy(config, parallel)
    found, corrections = sequences(LENGTHS), {}
    if engine is not None:
        found = [replace(s, rollout_logprobs=engine[place]) for place, s in enumerate(found)]
    once = shared_out(found, config, parallel)
    rows = policy.logprobs(once)
    if engine is not None:
        correction = build_correction(config.algorithm)
        once, corrected = correct_rollout(compute_old_logprobs(once, policy), correction)
        corrections = results(merge(gather_objects(corrected, parallel)))
    batch = replace(once, updates=[*once.updates, *once.updates])  # several, so that ratios are taken
    losses, norms, balance = [], [], []
    for _ in range(2):
        policy.learner.to_host()
        policy.learner.to_device()
        metrics = results(merge(gather_objects(policy.update(batch), parallel)))
        losses.append(metrics["actor/loss"])
        norms.append(metrics["actor/grad_norm"])
        balance += [metrics[name] for name in ("moe/aux_loss", "moe/z_loss") if name in metrics]
    return Outcome(
        losses=losses,
        norms=norms,
        balance=balance,
        corrections=corrections,
        logprobs={i: row for i, row in zip(once.global_index, rows, strict=True) if i >= 0},
        weights={name: tensor.clone() for name, tensor in policy.export()},
    )


def credited(config: RunConfig, rewards: list[float]) -> tuple[dict[int, torch.Tensor], dict[str, float]]:
    """Advantages of every token, by place in the step, and the metrics."""
    parallel = world(config)
    batch = replace(shared_out(sequences(LENGTHS), config, parallel), rewards=torch.tensor(rewards))
    batch, metrics = compute_advantages(batch, config.algorithm, parallel, TrainState())
    rows = {i: s.advantages[s.loss_mask] for i, s in zip(batch.global_index, batch.sequences, strict=True) if i >= 0}
    return rows, results(merge(gather_objects(metrics, parallel)))


def replayed(config: RunConfig) -> tuple[dict[int, torch.Tensor], float]:
    """Log-probabilities with made-up routes, by place in the step, and how far those without are."""
    parallel = world(config)
    policy = LogProbModel(config, parallel, config.model.path)
    moe = policy.spec.moe
    assert moe is not None
    found = []
    for place, sequence in enumerate(sequences()):
        generator = torch.Generator().manual_seed(place)
        scores = torch.rand(sequence.token_ids.numel(), policy.spec.num_layers, moe.num_experts, generator=generator)
        found.append(replace(sequence, routing=scores.topk(moe.experts_per_token).indices.to(torch.int16)))
    batch = shared_out(found, config, parallel)
    rows = policy.logprobs(batch, replay_routing=True)
    free = policy.logprobs(batch)
    apart = max(float((a - b).abs().max()) for a, b in zip(rows, free, strict=True))
    return {i: row for i, row in zip(batch.global_index, rows, strict=True) if i >= 0}, apart


@dataclass(frozen=True)
class Offloaded:
    """What moving a policy to the host did."""

    freed_bytes: int
    held_bytes: int
    """Of weights, gradients and optimizer states, before."""
    left_bytes: int
    """Of the same, while they are away."""


def offload(config: RunConfig) -> Offloaded:
    """Move parts of a policy to the host, and count."""
    policy = Policy(config, world(config))
    policy.update(batch_of())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in _tensors_of(policy)}
    held = sum(storage.nbytes() for storage in storages.values())
    freed = policy.learner.to_host()
    left = sum(storage.nbytes() for storage in storages.values())
    policy.learner.to_device()
    return Offloaded(freed_bytes=freed, held_bytes=held, left_bytes=left)


def _tensors_of(policy: Policy) -> Iterator[torch.Tensor]:
    yield from policy.parameters.values()
    for chunk in policy.learner.ddp:
        yield from (buffer.grad_data for buffer in chunk.buffers)
    for inner in patches.inner_optimizers(policy.learner.optimizer):
        for group in inner.optimizer.param_groups:
            yield from group["params"]
        for state in inner.optimizer.state.values():
            yield from (value for value in state.values() if value.ndim)


def reference_in_place(config: RunConfig, path: str) -> tuple[bool, float, bool]:
    """A hosted reference against a model of its own: are they bit-equal, how far is the policy, is it back."""
    parallel = world(config)
    policy, batch = Policy(config, parallel), batch_of()
    policy.update(batch)
    before, weights = policy.logprobs(batch), [p.detach().clone() for p in policy.parameters.values()]
    hosted = HostReference(policy, path).logprobs(batch)
    alone = LogProbModel(config, parallel, path).logprobs(batch)
    same = all(torch.equal(a, b) for a, b in zip(hosted, alone, strict=True))
    distance = max(float((a - b).abs().max()) for a, b in zip(hosted, before, strict=True))
    back = all(torch.equal(a, b) for a, b in zip(weights, policy.parameters.values(), strict=True))
    return same, distance, back


def shared_out(found: list[TrainSequence], config: RunConfig, parallel: ParallelContext) -> TrainBatch:
    """The sequences as one update, planned as the loop plans."""
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
        for s in found
    ]
    prompt = Prompt(prompt_id="0", token_ids=found[0].token_ids[:3], text="", answer=None)
    batch = make_batch([RolloutGroup(index=0, prompt=prompt, rollouts=rollouts)], config, parallel)
    known = [
        replace(
            s, advantages=found[i].advantages, old_logprobs=found[i].old_logprobs, ref_logprobs=found[i].ref_logprobs
        )
        if i >= 0
        else s
        for s, i in zip(batch.sequences, batch.global_index, strict=True)
    ]
    return replace(batch, sequences=known)


def checkpoint_round_trip(config: RunConfig, folder: str, *, save: bool) -> tuple[list[float], list[float]]:
    """Two updates, a checkpoint (or the one that is there), three more: gradient norms of those three."""
    parallel = world(config)
    first: list[float] = []
    if save:
        policy = Policy(config, parallel)
        for _ in range(2):
            policy.update(batch_of())
        if parallel.is_main:
            Path(folder).mkdir(parents=True)
        dist.barrier()
        save_learner(policy.learner, Path(folder))
        first = [_norm(policy, parallel) for _ in range(3)]
    resumed = Policy(config, parallel)
    load_learner(resumed.learner, Path(folder))
    return first, [_norm(resumed, parallel) for _ in range(3)]


def train_and_save(config: RunConfig, folder: str) -> dict[str, torch.Tensor]:
    """Some updates, a checkpoint, and the weights as they are exported."""
    parallel = world(config)
    policy = Policy(config, parallel)
    policy.update(batch_of())
    if parallel.is_main:
        Path(folder).mkdir(parents=True)
    dist.barrier()
    save_learner(policy.learner, Path(folder))
    return {name: tensor.clone() for name, tensor in policy.export()}


def save_both_ways(config: RunConfig, folder: str) -> None:
    """The same state synchronously and in the background, with an update while the latter is written."""
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


def round_trip_without_counting_gaps(config: RunConfig, folder: str) -> tuple[list[float], list[float]]:
    """``checkpoint_round_trip`` with one patch taken away."""
    include_bucket_padding = patches.include_bucket_padding
    patches.include_bucket_padding = lambda model: None
    try:
        return checkpoint_round_trip(config, folder, save=True)
    finally:
        patches.include_bucket_padding = include_bucket_padding


def diverge(config: RunConfig) -> tuple[str, bool]:
    """An update with an infinite advantage: what every rank raises, and whether its weights stayed."""
    parallel = world(config)
    policy = Policy(config, parallel)
    before = [p.detach().clone() for p in policy.parameters.values()]
    batch = batch_of()
    bad = [replace(s, advantages=torch.full_like(s.advantages, float("inf"))) for s in batch.sequences]
    try:
        policy.update(replace(batch, sequences=bad))
    except Exception as error:
        same = all(torch.equal(a, b) for a, b in zip(before, policy.parameters.values(), strict=True))
        return f"{type(error).__name__}: {error}", same
    return "nothing", False


def update_without_tokens_here(config: RunConfig) -> float:
    """An update in which only the first data-parallel rank has tokens with loss: its gradient norm."""
    parallel = world(config)
    batch = batch_of()
    if parallel.dp_rank > 0:
        masked = [replace(s, loss_mask=torch.zeros_like(s.loss_mask)) for s in batch.sequences]
        batch = replace(batch, sequences=masked)
    return Policy(config, parallel).update(batch)["actor/grad_norm"].result()


def _norm(policy: Policy, parallel: ParallelContext) -> float:
    return policy.update(batch_of())["actor/grad_norm"].result()


def threads_of_groups(number: int) -> tuple[int, int]:
    """By how many threads so many groups of this project, and so many of torch's own, make the process grow."""
    grown, made = [], []
    for kind in (event_loop.SharingGroup, event_loop._Gloo):
        distributed_c10d.ProcessGroupGloo = kind
        made.append(dist.new_group(backend="gloo"))  # the first makes what all share
        before = len(os.listdir("/proc/self/task"))
        made += [dist.new_group(backend="gloo") for _ in range(number)]
        grown.append(len(os.listdir("/proc/self/task")) - before)
    distributed_c10d.ProcessGroupGloo = event_loop.SharingGroup
    for group in made:
        dist.destroy_process_group(group)
    return grown[0], grown[1]


@dataclass(frozen=True)
class Adapted:
    """What updates of a policy with adapters did."""

    logprobs: dict[int, torch.Tensor]
    """After them, by place."""
    without: dict[int, torch.Tensor]
    """The same with the adapters switched off."""
    adapters: dict[str, torch.Tensor]
    merged: dict[str, torch.Tensor]
    frozen_changed: bool
    """A weight of the model itself did."""
    norms: list[float]
    bytes_learning: int
    """Of gradients and optimizer states on this rank."""


def adapted(config: RunConfig, folder: str | None = None) -> Adapted:
    """Two updates of a policy, with adapters or without, which then write a PEFT folder."""
    parallel = world(config)
    policy = Policy(config, parallel)
    before = {name: parameter.detach().clone() for name, parameter in policy.parameters.items()}
    batch = shared_out(sequences(LENGTHS), config, parallel)
    twice = replace(batch, updates=[*batch.updates, *batch.updates])
    norms = [results(policy.update(twice))["actor/grad_norm"] for _ in range(2)]
    with policy.without_adapters():
        without = policy.logprobs(batch)
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
    return Adapted(
        logprobs={i: row for i, row in zip(batch.global_index, rows, strict=True) if i >= 0},
        without={i: row for i, row in zip(batch.global_index, without, strict=True) if i >= 0},
        adapters=adapters,
        merged={name: tensor.clone() for name, tensor in policy.export()},
        frozen_changed=any(not torch.equal(before[name], x) for name, x in policy.parameters.items()),
        norms=norms,
        bytes_learning=held["grads"] + held["optimizer"],
    )


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    """What a policy exports as it begins."""
    return {name: tensor.clone() for name, tensor in Policy(config, world(config)).export()}


def scored(config: RunConfig) -> dict[int, torch.Tensor]:
    """Log-probabilities of the toy sequences by a policy as it begins."""
    parallel = world(config)
    batch = shared_out(sequences(LENGTHS), config, parallel)
    rows = Policy(config, parallel).logprobs(batch)
    return {i: row for i, row in zip(batch.global_index, rows, strict=True) if i >= 0}


def valued(config: RunConfig) -> dict[int, torch.Tensor]:
    """What a critic expects before each token of the toy sequences, as it begins."""
    parallel = world(config)
    own = config.for_critic()
    critic = Critic(own, build_another_layout(own.parallel, parallel))
    batch = shared_out(sequences(LENGTHS), own, critic.parallel)
    return {i: row for i, row in zip(batch.global_index, critic.values(batch), strict=True) if i >= 0}
