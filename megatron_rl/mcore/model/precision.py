"""Choose the layer implementation and FP8 settings that this machine supports, and access FP8 weights."""

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_rl.config.schema import RunConfig
from megatron_rl.errors import ConfigError
from megatron_rl.mcore.model.quantized import QuantizedWeight

Implementation = Literal["local", "transformer_engine"]


@dataclass(frozen=True)
class Fp8Needs:
    """Requirements of an FP8 recipe. Source: Transformer Engine's release notes and checks."""

    capability: tuple[int, int]
    """Minimum compute capability of the GPU."""
    below: tuple[int, int] | None
    """First compute capability that is not supported; None: no upper bound."""
    transformer_engine: tuple[int, int]
    """Minimum version of Transformer Engine."""
    align: int
    """Number of rows of every matrix product must be a multiple of this."""


FP8_NEEDS = {
    "delayed": Fp8Needs((8, 9), None, (1, 0), 16),
    "tensorwise": Fp8Needs((8, 9), None, (2, 2), 16),
    "blockwise": Fp8Needs((9, 0), (10, 0), (2, 3), 16),
    "mxfp8": Fp8Needs((10, 0), None, (2, 1), 32),
}


def installed(distribution: str) -> tuple[int, int] | None:
    """Major and minor version of a distribution; None if it is not installed."""
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    major, minor, *_ = version.split("+")[0].split(".")
    return int(major), int(minor)


def transformer_engine_version() -> tuple[int, int] | None:
    """Version of Transformer Engine if it is usable, that is with PyTorch bindings and a GPU; None otherwise."""
    if not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine_torch") is None:
        return None
    return installed("transformer-engine") or installed("transformer_engine")


def choose_implementation(config: RunConfig) -> Implementation:
    """Return Transformer Engine where it is usable and allowed, Megatron's own modules ("local") otherwise.

    Raises:
        ConfigError: the requested implementation or FP8 recipe cannot run on this machine.
    """
    requested, version = config.model.implementation, transformer_engine_version()
    if requested == "transformer_engine" and version is None:
        raise ConfigError(
            "model.implementation=transformer_engine: expected Transformer Engine with its PyTorch bindings and a GPU, "
            f"found {_engine_and_gpu()}. pip install 'transformer-engine[pytorch]', or set model.implementation=auto."
        )
    if config.lora.rank and requested == "transformer_engine":
        raise ConfigError(
            f"model.implementation=transformer_engine with lora.rank={config.lora.rank}: its layers fuse the norm into "
            "the linear layer, so adapters cannot read its normalised input. Set model.implementation=auto."
        )
    is_local = requested == "local" or version is None or config.lora.rank > 0
    chosen: Implementation = "local" if is_local else "transformer_engine"
    if config.precision.fp8 != "disabled":
        _check_fp8(config, chosen, version)
    return chosen


def _check_fp8(config: RunConfig, chosen: Implementation, version: tuple[int, int] | None) -> None:
    recipe = config.precision.fp8
    needs = FP8_NEEDS[recipe]
    if chosen != "transformer_engine" or version is None:
        raise ConfigError(
            f"precision.fp8={recipe}: expected Transformer Engine and a GPU with FP8, found {_engine_and_gpu()}, "
            f"model.implementation={config.model.implementation}. Set precision.fp8=disabled."
        )
    if config.model.dtype != "bf16":
        raise ConfigError(f"precision.fp8={recipe} with model.dtype={config.model.dtype}. Set model.dtype=bf16.")
    if version < needs.transformer_engine:
        raise ConfigError(
            f"precision.fp8={recipe}: expected Transformer Engine {_dotted(needs.transformer_engine)} or newer, found "
            f"{_dotted(version)}. Upgrade it, or choose another recipe."
        )
    capability = torch.cuda.get_device_capability()
    if capability < needs.capability or (needs.below is not None and capability >= needs.below):
        range_ = f"{_dotted(needs.capability)} or more" + (f", below {_dotted(needs.below)}" if needs.below else "")
        raise ConfigError(
            f"precision.fp8={recipe}: expected a GPU of compute capability {range_}, found {_dotted(capability)} "
            f"({torch.cuda.get_device_name()}). Choose another recipe, or precision.fp8=disabled."
        )


def _engine_and_gpu() -> str:
    version = installed("transformer-engine") or installed("transformer_engine")
    engine = f"Transformer Engine {_dotted(version)}" if version else "no Transformer Engine"
    return f"{engine} and {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def fp8_settings(config: RunConfig) -> dict[str, Any]:
    """FP8 fields of Megatron's TransformerConfig; empty without FP8."""
    precision = config.precision
    if precision.fp8 == "disabled":
        return {}
    return {
        "fp8": "e4m3" if precision.fp8 == "mxfp8" else "hybrid",
        "fp8_recipe": precision.fp8,
        "fp8_param": precision.fp8_params,
        # the maximum over a long history, as in Transformer Engine's own default
        **({"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"} if precision.fp8 == "delayed" else {}),
        "first_last_layers_bf16": bool(precision.bf16_first_layers or precision.bf16_last_layers),
        "num_layers_at_start_in_bf16": precision.bf16_first_layers,
        "num_layers_at_end_in_bf16": precision.bf16_last_layers,
    }


def row_multiple(config: RunConfig) -> int:
    """The number of rows of a matrix product on each rank must be a multiple of this."""
    return 1 if config.precision.fp8 == "disabled" else FP8_NEEDS[config.precision.fp8].align


def set_weight(parameter: Tensor, shard: Tensor) -> None:
    """Set a parameter's value; an FP8 parameter also keeps the exact value, which initialises its master weight."""
    parameter.copy_(shard)
    if hasattr(parameter, "get_high_precision_init_val"):
        parameter._high_precision_init_val = shard.cpu()  # type: ignore[attr-defined]


def plain_weight(parameter: Tensor) -> Tensor:
    """The detached parameter, dequantised to its compute dtype if it is stored in fewer bits."""
    weight = parameter.detach()
    if isinstance(weight, QuantizedWeight):
        return weight.dequantized()
    return weight.dequantize() if hasattr(weight, "_quantizer") else weight
