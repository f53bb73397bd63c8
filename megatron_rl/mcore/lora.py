"""LoRA adapters for Megatron's parallel linear layers. Source: LoRA, arXiv 2106.09685."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_rl.config.lora import LoraSection
from megatron_rl.mcore.model.gpt_model import global_parameters, place_of
from megatron_rl.mcore.model.quantized import Format, quantized
from megatron_rl.mcore.sharded_model import ShardedModel, replica_group
from megatron_rl.models.lora import AdaptableMatrix, adaptable_matrices, lora_table
from megatron_rl.types import ParallelContext
from megatron_rl.weights.export import export_weights
from megatron_rl.weights.layout import LayoutTable, fill_shard, hf_shapes
from megatron_rl.weights.peft_files import FreshAdapters, PeftReader

IS_ADAPTER = "_lora."
"""Substring of the parameter names of adapters, and of no other parameters."""


class Adapter(torch.nn.Module):
    """The adapters of one linear layer, which may hold several matrices; their output is added to the layer's."""

    def __init__(
        self,
        matrices: Mapping[str, AdaptableMatrix],
        config: LoraSection,
        parallel: ParallelContext,
        *,
        groups: int,
        sequence_parallel: bool,
        dtype: torch.dtype,
    ) -> None:
        """
        Args:
            matrices: all matrices of the layer, by name.
            config: LoRA section; only the matrices in ``targets`` get an adapter.
            parallel: layout of this rank.
            groups: number of interleaved blocks in this rank's output; each block holds the rows of every matrix in
                turn, such as [q, k, v] of one query group.
            sequence_parallel: whether the layer's input or output is split along the sequence.
            dtype: dtype of the adapters' parameters.
        """
        super().__init__()
        (self._splits_rows,) = {matrix.splits_rows for matrix in matrices.values()}
        self._scale, self._groups, self._tp = config.scale, groups, parallel.groups.tp
        self._sequence_parallel = sequence_parallel
        size = parallel.tp_size
        self._rows = {name: matrix.rows // (size if matrix.splits_rows else 1) for name, matrix in matrices.items()}
        self._names = [name for name in matrices if name in config.targets]
        for name in self._names:
            matrix = matrices[name]
            columns = matrix.columns // (1 if matrix.splits_rows else size)
            a = torch.nn.Parameter(torch.empty(config.rank, columns, dtype=dtype, device=parallel.device))
            b = torch.nn.Parameter(torch.empty(self._rows[name], config.rank, dtype=dtype, device=parallel.device))
            # registered on this module, not in a ParameterDict: Megatron's hooks only handle modules that are called
            self.register_parameter(f"a_{name}", a)
            self.register_parameter(f"b_{name}", b)
            split, replicated, dim = (b, a, 0) if matrix.splits_rows else (a, b, 1)
            set_tensor_model_parallel_attributes(split, True, dim, 1)
            # with sequence parallelism each rank has a share of the tokens, so this gradient must be summed over ranks
            replicated.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        self.is_enabled = True

    @property
    def a(self) -> dict[str, Tensor]:
        """A matrices [rank, columns] of this rank, by the name of the adapted matrix."""
        return {name: getattr(self, f"a_{name}") for name in self._names}

    @property
    def b(self) -> dict[str, Tensor]:
        """B matrices [rows, rank] of this rank, by the name of the adapted matrix."""
        return {name: getattr(self, f"b_{name}") for name in self._names}

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the [T, 1, rows] to add to the output of the layer, for its input [T, 1, columns] on this rank."""
        inner = F.linear(hidden, torch.cat(list(self.a.values())))
        inner = self._all_tokens(inner) if self._splits_rows else self._sum_over_ranks(inner)
        return F.linear(inner, self._all_b())

    def delta(self) -> Tensor:
        """Return the [rows, columns] to add to this rank's weight to merge the adapters."""
        return self._all_b().float() @ torch.cat(list(self.a.values())).float()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Return the adapters' parameters as sharded tensors for Megatron's checkpoints."""
        state = self.state_dict(prefix="", keep_vars=True)
        matrix, dim = ("b", 0) if self._splits_rows else ("a", 1)
        split = {name: dim for name in state if name.startswith(matrix + "_")}
        return make_sharded_tensors_for_checkpoint(
            state, prefix, split, sharded_offsets, tp_group=self._tp, dp_cp_group=metadata["dp_cp_group"]
        )

    def _all_tokens(self, inner: Tensor) -> Tensor:
        """Give every rank's rows all tokens; the gradient is summed over the ranks."""
        if self._sequence_parallel:
            return gather_from_sequence_parallel_region(inner, group=self._tp)
        return copy_to_tensor_model_parallel_region(inner, group=self._tp)

    def _sum_over_ranks(self, inner: Tensor) -> Tensor:
        """Sum over the tensor-parallel ranks, each of which holds a share of the columns."""
        if self._sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(inner, group=self._tp)
        return reduce_from_tensor_model_parallel_region(inner, group=self._tp)

    def _all_b(self) -> Tensor:
        """Return the scaled block matrix [rows, rank x number of adapters] of all B matrices.

        The rows of each adapted matrix read only the inner features of its own A matrix.
        """
        blocks = []
        for name, rows in self._rows.items():
            parts = [
                self.b[name] if name == other else self.b[other].new_zeros(rows, b.size(1))
                for other, b in self.b.items()
            ]
            blocks.append(torch.cat(parts, dim=1).unflatten(0, (self._groups, -1)))
        return self._scale * torch.cat(blocks, dim=1).flatten(0, 1)


class LoraAdapters:
    """All adapters of a model, whose other parameters are frozen."""

    def __init__(self, model: ShardedModel) -> None:
        """Freeze the model, attach adapters to its layers, and load them from ``lora.path`` or initialise them.

        Raises:
            ConversionError: the adapters in ``lora.path`` do not match the configuration.
        """
        self.config, self._model = model.config.lora, model
        self._adapters: dict[str, Adapter] = {}
        for chunk in model.chunks:
            chunk.requires_grad_(False)
            if self.config.quantize != "none":
                _quantize(
                    chunk, {matrix.module for matrix in adaptable_matrices(model.spec).values()}, self.config.quantize
                )
        model.parameters = global_parameters(model.chunks, model.parallel)
        for chunk in model.chunks:
            for layer in chunk.decoder.layers:
                self._attach(chunk, layer)
            if chunk.pre_process:  # activation recomputation needs a layer input that requires a gradient
                chunk.embedding.register_forward_hook(_require_gradient)
        all_parameters = global_parameters(model.chunks, model.parallel)
        self.parameters = {name: parameter for name, parameter in all_parameters.items() if IS_ADAPTER in name}
        """This rank's adapter parameters, by their names in ``lora_table``."""
        table = lora_table(model.spec, self.config.rank, self.config.targets)
        self._read(table)
        self._export_plan = model.plan_export(self.parameters, table)

    @property
    def is_in_first_replica(self) -> bool:
        """Whether this rank belongs to the same model replica as global rank 0."""
        return self._model.is_in_first_replica

    @torch.no_grad()
    def merge_into(self, weights: dict[str, Tensor]) -> None:
        """Replace every weight that has an adapter by a merged copy, one weight at a time."""
        for name, adapter in self._adapters.items():
            weight = weights.pop(name)
            weights[name] = (weight.float() + adapter.delta()).to(weight.dtype)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Stream the adapters by PEFT's names without its prefix; collective like ``ShardedModel.export``."""
        shards = {name: parameter.detach() for name, parameter in self.parameters.items()}
        return export_weights(self._export_plan, shards, replica_group(self._model.parallel))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Disable the adapters during the body."""
        for adapter in self._adapters.values():
            adapter.is_enabled = False
        try:
            yield
        finally:
            for adapter in self._adapters.values():
                adapter.is_enabled = True

    def _attach(self, chunk: Any, layer: Any) -> None:
        spec, parallel = self._model.spec, self._model.parallel
        adaptable = adaptable_matrices(spec)
        for module in dict.fromkeys(matrix.module for matrix in adaptable.values()):
            matrices = {name: matrix for name, matrix in adaptable.items() if matrix.module == module}
            if not set(matrices) & set(self.config.targets):
                continue
            block, linear = module.split(".")
            adapter = Adapter(
                matrices,
                self.config,
                parallel,
                groups=spec.num_query_groups // parallel.tp_size if "q_proj" in matrices else 1,
                sequence_parallel=chunk.config.sequence_parallel,
                dtype=chunk.config.params_dtype,
            )
            parent = getattr(layer, block)
            parent.add_module(f"{linear}_lora", adapter)
            getattr(parent, linear).register_forward_hook(_add_output_of(adapter))
            self._adapters[f"decoder.layers.{layer.layer_number - 1}.{module}.weight"] = adapter

    @torch.no_grad()
    def _read(self, table: LayoutTable) -> None:
        config, shapes, place = self.config, hf_shapes(table), place_of(self._model.parallel)
        reader = (
            FreshAdapters(shapes, self._model.config.run.seed)
            if config.path is None
            else PeftReader(config.path, shapes, rank=config.rank, alpha=config.alpha)
        )
        for name, parameter in self.parameters.items():
            fill_shard(parameter, place.slices(table[name]), reader.read)


@torch.no_grad()
def _quantize(chunk: Any, modules: Collection[str], kind: Format) -> None:
    """Replace the matrices of a chunk's layers by quantised ones and free the dense ones."""
    for layer in chunk.decoder.layers:
        for module in modules:
            linear = layer.get_submodule(module)
            linear.weight = torch.nn.Parameter(quantized(linear.weight, kind), requires_grad=False)


def _add_output_of(adapter: Adapter) -> Callable[[Any, Any, Any], Any]:
    def add(module: Any, inputs: Any, output: Any) -> Any:
        product, *rest = output
        return (product + adapter(inputs[0]), *rest) if adapter.is_enabled else output

    return add


def _require_gradient(module: Any, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output
