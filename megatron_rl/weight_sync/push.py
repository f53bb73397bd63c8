"""Push the policy's weights to the rollout engine: plan once, then stream, verify and report every push."""

import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.batching.batch import given_batch
from megatron_rl.batching.sequences import bare_sequence
from megatron_rl.config.schema import RunConfig
from megatron_rl.distributed.collectives import any_rank, gather_objects, raise_together
from megatron_rl.errors import WeightSyncError
from megatron_rl.mcore.logprob_model import LogProbModel
from megatron_rl.mcore.model.gpt_model import place_of
from megatron_rl.mcore.policy import Policy
from megatron_rl.metrics.metric import Max, Mean, Reduction
from megatron_rl.models import layout_table
from megatron_rl.models.engine_shards import engine_boxes
from megatron_rl.rollout.engines.base import Engine, Request
from megatron_rl.rollout.engines.sampling import sample_seed
from megatron_rl.types import SamplingParams, TrainSequence
from megatron_rl.weight_sync.host_memory import PeerAccess, expose_host_memory
from megatron_rl.weight_sync.plan import ReshardPlan, plan_reshard
from megatron_rl.weight_sync.shared_folder import expose_in_folder
from megatron_rl.weight_sync.transfer import Traffic, Transfer
from megatron_rl.weight_sync.verify import ReceivedChecksums, sent_checksums
from megatron_rl.weights.hf_files import torch_dtype
from megatron_rl.weights.layout import Box, full_box, hf_shapes

# tokens of the probe prompt that every engine completes after a push
PROBE_PROMPT = 4
# default of weight_sync.probe_limit for each model.dtype, in nats
PROBE_LIMITS = {"fp32": 1e-3, "bf16": 0.2}


class WeightSync:
    """Pushes the weights of a policy to the engine of the same ranks."""

    def __init__(self, policy: Policy, engine: Engine, config: RunConfig) -> None:
        """Make the same plan on every rank; collective."""
        self._policy = policy
        self._engine = engine
        self._config = config
        self._parallel = policy.parallel
        # NCCL requires every rank in the first operation of a group, but not every rank sends in every bucket
        dist.all_reduce(torch.zeros(1, device=self._parallel.device))
        self._plan = self._make_plan()
        rank, size = self._parallel.rank, self._element_size()
        self._planned_bytes = self._plan.num_received(rank) * size
        self._least_bytes = self._plan.minimum(rank) * size
        self._transfer = Transfer(self._plan, rank, peer_access=self._peer_access())
        self._num_pushes = 0

    def push(self, version: int) -> dict[str, Reduction]:
        """Push the policy's weights to the engines, unless all have this version already; collective.

        Returns:
            Metrics of the bytes transferred and the speed; empty if nothing was pushed.

        Raises:
            WeightSyncError: a tensor is missing, unexpected, misshapen or changed in transfer, the engine reports
                another version, or its log-probabilities differ from the policy's.
            EngineDied: on every rank, if the engine of one has died; the other engines may keep the new version.
        """
        if not any_rank(self._engine.version != version, self._parallel):
            return {}
        with self._policy.learner.weights_on_device():
            return self._push(version)

    def _push(self, version: int) -> dict[str, Reduction]:
        if self._config.rollout.sleep_engine:
            with raise_together(self._parallel):
                self._engine.wake("weights")
        settings = self._config.weight_sync
        every = settings.verify_every
        is_checked = self._num_pushes == 0 or (every > 0 and self._num_pushes % every == 0)
        shards, traffic, start = self._policy.shards(), Traffic(), time.perf_counter()
        received = ReceivedChecksums(self._plan, self._parallel.rank)
        tensors = self._transfer.stream(shards, traffic)
        with raise_together(self._parallel):
            try:
                self._engine.load_weights(received.watch(tensors) if is_checked else tensors, version)
            finally:
                for _ in tensors:  # even if the engine failed, because the other ranks wait for this rank's messages
                    pass
            if self._engine.version != version:
                raise WeightSyncError(
                    f"the engine reports version {self._engine.version} after version {version} was pushed."
                )
        seconds = time.perf_counter() - start
        if is_checked:
            self._check(received, shards, version)
        del shards
        metrics = self._report(traffic, seconds)
        if settings.probe_tokens:
            if self._config.rollout.sleep_engine:
                with raise_together(self._parallel):
                    self._engine.wake("kv_cache")
            metrics |= self._probe(version)
        self._num_pushes += 1
        return metrics

    def _make_plan(self) -> ReshardPlan:
        parallel, place, spec = self._parallel, self._engine.place, self._policy.spec
        table = layout_table(spec, parallel.tp_size)
        shapes = hf_shapes(table)
        own = (list(self._policy.parameters), place_of(parallel), place.tp_rank, socket.gethostname())
        gathered = gather_objects(own, parallel)
        # a shared folder is equally close to all nodes, so they count as one
        hosts = ["" if self._config.weight_sync.transport == "disk" else host for *_, host in gathered]
        boxes: Sequence[Mapping[str, Box]] = (
            [{name: full_box(shape) for name, shape in shapes.items()}] * place.tp_size
            if self._config.weight_sync.full_tensors
            else [engine_boxes(spec, shapes, tp_rank=rank, tp_size=place.tp_size) for rank in range(place.tp_size)]
        )
        return plan_reshard(
            [(names, policy_place) for names, policy_place, _, _ in gathered],
            table,
            [boxes[rank] for _, _, rank, _ in gathered],
            [hosts.index(host) for host in hosts],
            bucket_elements=self._config.weight_sync.bucket_mb * 2**20 // self._element_size(),
        )

    def _peer_access(self) -> PeerAccess:
        if self._config.weight_sync.transport == "direct":
            return expose_host_memory
        folder = Path(self._config.weight_sync.folder or Path(self._config.run.output_dir) / "weights")
        return partial(expose_in_folder, folder, gather_objects(uuid.uuid4().hex[:8], self._parallel)[0])

    def _check(self, received: ReceivedChecksums, shards: Mapping[str, Tensor], version: int) -> None:
        place = self._engine.place
        readers = list(range(place.tp_size))  # all engines read the same boxes, so those of the first suffice
        sent = sent_checksums(self._plan, shards, readers, self._parallel)
        with raise_together(self._parallel):
            received.check(sent[place.tp_rank], version)

    def _report(self, traffic: Traffic, seconds: float) -> dict[str, Reduction]:
        rank = self._parallel.rank
        if traffic.bytes_received != self._planned_bytes:
            raise WeightSyncError(
                f"rank {rank} received {traffic.bytes_received} bytes, but the plan has {self._planned_bytes}."
            )
        return {
            "weight_sync/seconds": Max(seconds),
            "weight_sync/received_mb": Max(traffic.bytes_received / 1e6),
            "weight_sync/planned_mb": Max(self._planned_bytes / 1e6),
            "weight_sync/minimum_mb": Max(self._least_bytes / 1e6),
            "weight_sync/gb_per_s": Mean(traffic.bytes_received / 1e9 / seconds),
            "weight_sync/peak_extra_mb": Max(traffic.peak_buffer_bytes / 1e6),
        }

    def _probe(self, version: int) -> dict[str, Reduction]:
        """Compare the log-probabilities of a short sample of every engine with the policy's.

        Raises:
            WeightSyncError: on every rank, if they differ by more than the limit.
        """
        settings, rollout = self._config.weight_sync, self._config.rollout
        limit = settings.probe_limit or PROBE_LIMITS[self._config.model.dtype]
        params = SamplingParams(
            temperature=rollout.temperature,
            top_p=1.0,
            top_k=0,
            max_new_tokens=settings.probe_tokens,
            stop_token_ids=(),
        )
        prompt = torch.arange(PROBE_PROMPT) % self._policy.spec.vocab_size
        seed = sample_seed(self._config.run.seed, version, self._engine.place.index)
        with raise_together(self._parallel):
            request = Request(key=0, token_ids=prompt, seeds=(seed,))
            results = list(self._engine.generate(iter([request]), params, max_requests=1))
        sampled = [result.completion for part in gather_objects(results, self._parallel) for result in part]
        rows = policy_logprobs(self._policy, [(prompt, completion.token_ids) for completion in sampled])
        differences = [
            float((row - completion.logprobs).abs().mean()) for row, completion in zip(rows, sampled, strict=True)
        ]
        if not max(differences) <= limit:  # rejects NaN as well
            raise WeightSyncError(
                f"after the push of version {version} the log-probabilities of {settings.probe_tokens} sampled tokens "
                f"differ by {max(differences):.3g} nats between engine and policy, more than {limit:g} "
                "(weight_sync.probe_limit). The engine's weights, temperature or precision differ from the policy's."
            )
        return {"weight_sync/probe_difference": Max(max(differences))}

    def _element_size(self) -> int:
        return torch_dtype(self._config.model.dtype).itemsize


def policy_logprobs(policy: LogProbModel, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Log-probabilities of every response under the policy, [R] float32 each; collective.

    Args:
        pairs: (prompt [P], response [R]) token ids, int64, the same on every rank.
    """
    parallel = policy.parallel
    # the interleaved schedule runs rounds of pp_size micro-batches
    rounds = parallel.pp_size if parallel.vp_size > 1 else 1
    sequences = [_response_sequence(*pair) for pair in pairs]
    sequences += [sequences[0]] * (-len(sequences) % rounds)
    rows = policy.logprobs(given_batch(sequences, [range(i, len(sequences), rounds) for i in range(rounds)]))
    return [row[prompt.numel() :] for row, (prompt, _) in zip(rows, pairs, strict=False)]


def _response_sequence(prompt: Tensor, response: Tensor) -> TrainSequence:
    """A sequence whose loss mask covers the response."""
    token_ids = torch.cat([prompt, response])
    return bare_sequence(token_ids, torch.arange(token_ids.numel()) >= prompt.numel())
