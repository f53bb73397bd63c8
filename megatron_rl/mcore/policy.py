"""The policy: a Megatron model that scores sequences, learns from them and hands its weights out."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import Tensor

from megatron_rl.algorithms.kl import k1
from megatron_rl.algorithms.objective import Objective, build_objective
from megatron_rl.batching.align import unalign
from megatron_rl.collective import any_rank
from megatron_rl.config.schema import RunConfig
from megatron_rl.errors import TrainingDiverged
from megatron_rl.mcore import patches
from megatron_rl.mcore.forward import ForwardPass
from megatron_rl.mcore.model import build_model, check_weights, global_parameters, load_hf_weights, transformer_config
from megatron_rl.mcore.optimizer import build_optimizer, build_scheduler, step_if_finite
from megatron_rl.metrics.metric import Max, Mean, Reduction, merge
from megatron_rl.models import layout_table, read_model_spec
from megatron_rl.types import MicroBatch, ParallelContext, TrainBatch, UpdatePlan
from megatron_rl.weights.export import export_weights, plan_export
from megatron_rl.weights.hf_files import torch_dtype


class ScoringModel:
    """A model that gives log-probabilities and its weights; as it stands, the reference model."""

    def __init__(self, config: RunConfig, parallel: ParallelContext, path: str) -> None:
        """Build this rank's part and read its weights from a Hugging Face folder."""
        self.spec = read_model_spec(path)
        self.parallel = parallel
        self.transformer_config = transformer_config(self.spec, config.parallel, torch_dtype(config.model.dtype))
        self.model = build_model(self.spec, self.transformer_config, parallel)
        load_hf_weights(self.model, self.spec, parallel, check_weights(self.spec, path))
        self._table = layout_table(self.spec, parallel.tp_size)
        self._export_plan = plan_export(self._held_by_replica(), self._table, parallel.tp_size)
        self._packed = config.batching.packed
        self._temperature = config.rollout.temperature if config.rollout.source == "engine" else 1.0
        self._multiple_of = parallel.tp_size if config.parallel.sequence_parallel else 1

    def logprobs(self, batch: TrainBatch) -> list[Tensor]:
        """Log-probabilities of this rank's sequences under the current weights, [L] float32 each.

        Every rank takes part; the last pipeline stage shares its result with the others.
        """
        distinct = dict.fromkeys(tuple(places) for update in batch.updates for places in update.micro_batches)
        self.model.eval()
        results = self._forward(self.model).run(
            [[batch.sequences[i] for i in places] for places in distinct], _collect_logprobs, forward_only=True
        )
        self.model.train()
        rows = [torch.zeros(sequence.token_ids.numel()) for sequence in batch.sequences]
        if self.parallel.is_last_stage:
            for places, values in zip(distinct, results, strict=True):
                for place, row in zip(places, values, strict=True):
                    rows[place] = row.cpu()
        return self._share_over_stages(rows)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """The weights as whole Hugging Face tensors, streamed.

        Collective over the ranks of one replica, each of which must exhaust the iterator.
        """
        parameters = {name: parameter.detach() for name, parameter in global_parameters(self.model).items()}
        return export_weights(self._export_plan, parameters, self.parallel.groups.mp)

    def _forward(self, model: torch.nn.Module) -> ForwardPass:
        return ForwardPass(
            model,
            self.parallel,
            vocab_size=self.spec.vocab_size,
            temperature=self._temperature,
            packed=self._packed,
            multiple_of=self._multiple_of,
        )

    def _held_by_replica(self) -> list[tuple[list[str], int]]:
        group = self.parallel.groups.mp
        mine = (list(global_parameters(self.model)), self.parallel.tp_rank)
        held: list[Any] = [mine] * group.size()
        dist.all_gather_object(held, mine, group=group)
        return held

    def _share_over_stages(self, rows: list[Tensor]) -> list[Tensor]:
        group = self.parallel.groups.pp
        if group.size() == 1:
            return rows
        flat = torch.cat(rows).to(self.parallel.device)
        dist.broadcast(flat, src=dist.get_process_group_ranks(group)[-1], group=group)
        return list(flat.cpu().split([row.numel() for row in rows]))


class Policy(ScoringModel):
    """The model that learns: gradients, optimizer and schedule on top."""

    def __init__(self, config: RunConfig, parallel: ParallelContext) -> None:
        super().__init__(config, parallel, config.model.path)
        distributed = config.parallel.distributed_optimizer
        self.ddp = DistributedDataParallel(
            self.transformer_config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed),
            self.model,
        )
        patches.count_gaps(self.ddp)
        self.optimizer = build_optimizer(
            config.optimizer, self.ddp, torch_dtype(config.model.dtype), distributed=distributed
        )
        num_updates = max(1, config.run.num_steps * config.batching.num_updates * config.batching.num_epochs)
        self.scheduler = build_scheduler(config.optimizer, self.optimizer, num_updates)
        self.transformer_config.finalize_model_grads_func = finalize_model_grads
        self.transformer_config.grad_scale_func = self.optimizer.scale_loss
        self._loss = _PolicyLoss(build_objective(config.algorithm), on_samples=config.rollout.source == "engine")

    def update(self, batch: TrainBatch) -> dict[str, Reduction]:
        """Make every optimizer update of the batch.

        Raises:
            TrainingDiverged: on every rank before the weights change, when a loss or gradient is not finite.
        """
        return merge(self._update_once(batch, plan) for plan in batch.updates)

    def _update_once(self, batch: TrainBatch, plan: UpdatePlan) -> dict[str, Reduction]:
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = self._forward(self.ddp).run(
            [[batch.sequences[i] for i in places] for places in plan.micro_batches],
            self._loss,
            forward_only=False,
        )
        metrics = merge(results)
        self._raise_unless_finite(metrics)
        self.scheduler.step(increment=1)  # before the update, so that the first one has a learning rate above 0
        norm = step_if_finite(self.optimizer)
        if self.parallel.tp_rank != 0:
            metrics = {}  # the tensor-parallel ranks all saw the same tokens
        rate = self.optimizer.param_groups[0]["lr"] if self.optimizer.param_groups else 0.0
        return {**metrics, "actor/grad_norm": Max(norm), "actor/lr": Max(rate)}

    def _raise_unless_finite(self, metrics: dict[str, Reduction]) -> None:
        if any_rank(bool(metrics) and not math.isfinite(_loss_sum(metrics)), self.parallel):
            raise TrainingDiverged(
                "the loss is not finite. The weights were left as they were. "
                "Lower optimizer.lr, or look at the last rollouts."
            )


def _loss_sum(metrics: dict[str, Reduction]) -> float:
    """The sum, and not the mean: a rank may have no token with loss in an update."""
    loss = metrics["actor/loss"]
    assert isinstance(loss, Mean)
    return loss.total


class _PolicyLoss:
    """Sum of weight times token loss, with what the metrics need."""

    def __init__(self, objective: Objective, *, on_samples: bool) -> None:
        self._objective = objective
        self._on_samples = on_samples

    def __call__(self, batch: MicroBatch, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, dict[str, Mean]]:
        mask, weights = batch.loss_mask, batch.loss_weights[batch.loss_mask]
        logprobs, entropy, old = logprobs[mask], entropy[mask], batch.old_logprobs[mask]
        terms = self._objective(logprobs, old, batch.ref_logprobs[mask], batch.advantages[mask], entropy)
        loss = (weights * terms.total).sum()
        count = int(mask.sum())
        sums = {
            "actor/loss": loss,
            "actor/pg_loss": (weights * terms.policy).sum(),
            "actor/entropy": entropy.sum(),
        }
        if self._on_samples:  # demonstrations have no log-probabilities of before
            sums["actor/pg_clipfrac"] = terms.clipped.sum()
            sums["actor/ppo_kl"] = k1(old, logprobs).sum()
        if terms.kl is not None:
            sums["actor/kl_loss"] = terms.kl.sum()
        metrics = {name: Mean(float(value.detach()), count) for name, value in sums.items()}
        # the sum keeps a path to the logits also when no token has a loss
        return loss + 0.0 * logprobs.sum(), mask.sum().int(), metrics


def _collect_logprobs(batch: MicroBatch, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    return logprobs.sum(), batch.loss_mask.sum().int(), unalign(logprobs, batch)
