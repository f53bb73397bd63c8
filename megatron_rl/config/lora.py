"""Low-rank adapters: few parameters that learn in the place of all."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from megatron_rl.config.checks import require

LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class LoraSection:
    """Adapters of the policy (LoRA, arXiv 2106.09685); the model's own weights stay as they are."""

    rank: int = 0
    """Inner dimension of the adapters; 0: none, all weights learn."""
    alpha: float = 32.0
    """What an adapter adds is scaled by alpha / rank."""
    targets: list[LoraTarget] = field(default_factory=lambda: list(get_args(LoraTarget)))
    """Matrices that get one, by their Hugging Face names."""
    path: str | None = None
    """PEFT folder of the adapters to begin with; null: fresh ones, which add nothing yet."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """In what the frozen matrices of the layers are kept (QLoRA, arXiv 2305.14314); they are dense while they are
    multiplied."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, "lora.rank", self.rank, "0 (no adapters) or more")
        require(self.alpha > 0, "lora.alpha", self.alpha, "more than 0")
        require(
            bool(self.targets) and len(set(self.targets)) == len(self.targets),
            "lora.targets",
            self.targets,
            "at least one, and each once",
        )
        require(self.rank > 0 or self.path is None, "lora.path", self.path, "nothing without a rank in lora.rank")
        require(
            self.rank > 0 or self.quantize == "none", "lora.quantize", self.quantize, "none without a rank in lora.rank"
        )

    @property
    def scale(self) -> float:
        """Factor of what an adapter adds."""
        return self.alpha / self.rank
