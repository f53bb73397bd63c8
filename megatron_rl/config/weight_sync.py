"""How the engines receive the policy's weights."""

from dataclasses import dataclass
from typing import Literal

from megatron_rl.config.checks import positive, require


@dataclass(frozen=True, kw_only=True)
class WeightSyncSection:
    """How the engine gets the policy's weights."""

    bucket_mb: int = 512
    """Most MiB that a rank receives at a time, unless a layer of every pipeline stage has more."""
    full_tensors: bool = False
    """Give every engine rank whole tensors and not only the part that it reads, for loaders that quantise."""
    transport: Literal["direct", "disk"] = "direct"
    """How weights come from other ranks: through their memory and messages, or, as the last resort, through files."""
    folder: str | None = None
    """Where the files are for as long as a push takes; all nodes must share it. null: weights in the run folder."""
    verify_every: int = 50
    """Pushes between checks of every tensor's checksum; the first push is always checked, 0: only that one."""
    probe_tokens: int = 8
    """Tokens that every engine samples after a push, for their log-probabilities to be compared; 0 is off."""
    probe_limit: float | None = None
    """Largest mean difference of those log-probabilities in nats; null: 0.001 in fp32, 0.2 in bf16."""

    def __post_init__(self) -> None:
        positive("weight_sync", self, "bucket_mb")
        is_known = self.transport == "disk" or self.folder is None
        require(is_known, "weight_sync.folder", self.folder, "null, unless weight_sync.transport=disk")
        require(self.verify_every >= 0, "weight_sync.verify_every", self.verify_every, "0 or more")
        require(self.probe_tokens >= 0, "weight_sync.probe_tokens", self.probe_tokens, "0 (off) or more")
        limit = self.probe_limit
        require(limit is None or limit > 0, "weight_sync.probe_limit", limit, "null, or more than 0")
