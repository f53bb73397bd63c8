"""Configuration of LoRA adapters."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from megatron_rl.config.checks import require

LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class LoraSection:
    """Low-rank adapters of the policy (LoRA, arXiv 2106.09685); the model's own weights are frozen."""

    rank: int = 0
    """Rank of the LoRA adapters; 0: no adapters, all weights are trained."""
    alpha: float = 32.0
    """LoRA alpha: the output of an adapter is scaled by alpha / rank."""
    targets: list[LoraTarget] = field(default_factory=lambda: list(get_args(LoraTarget)))
    """Matrices that get an adapter, by their Hugging Face names (PEFT's target_modules)."""
    path: str | None = None
    """PEFT folder of the adapters to start from; null: new adapters, whose output is 0 at first."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Storage format of the frozen matrices of the layers (QLoRA, arXiv 2305.14314); they are dequantised for every
    multiplication. none: model.dtype."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, "lora.rank", self.rank, "0 (no adapters) or more")
        require(self.alpha > 0, "lora.alpha", self.alpha, "more than 0")
        require(
            bool(self.targets) and len(set(self.targets)) == len(self.targets),
            "lora.targets",
            self.targets,
            "at least one, and each once",
        )
        require(self.rank > 0 or self.path is None, "lora.path", self.path, "null unless lora.rank is above 0")
        require(
            self.rank > 0 or self.quantize == "none", "lora.quantize", self.quantize, "none unless lora.rank is above 0"
        )

    @property
    def scale(self) -> float:
        """Factor by which the output of an adapter is scaled."""
        return self.alpha / self.rank
