"""Configuration of weight synchronisation from the trainer to the engines."""

from dataclasses import dataclass
from typing import Literal

from megatron_rl.config.checks import positive, require


@dataclass(frozen=True, kw_only=True)
class WeightSyncSection:
    """How weights are pushed from the trainer to the engines."""

    bucket_mb: int = 512
    """Bucket size: MiB that a rank receives at a time; a bucket is larger only if one layer of every pipeline stage
    is."""
    full_tensors: bool = False
    """true: send whole tensors to every engine rank, for loaders that quantise; false: send only the part of a tensor
    that the rank reads."""
    transport: Literal["direct", "disk"] = "direct"
    """How weights are sent between ranks. direct: by shared memory and messages; disk: by files in a shared folder, as
    a last resort."""
    folder: str | None = None
    """Folder for the files of transport=disk during a push; all nodes must share it. null: weights/ in the run
    folder."""
    verify_every: int = 50
    """Interval, in pushes, at which the checksum of every tensor is verified; the first push is always verified. 0:
    only the first."""
    probe_tokens: int = 8
    """Tokens that every engine samples after a push, to compare their log-probabilities with the trainer's; 0 is
    off."""
    probe_limit: float | None = None
    """Largest mean absolute difference, in nats, between engine and trainer log-probabilities of the probe_tokens,
    above which the push fails; null: 0.001 in fp32, 0.2 in bf16."""

    def __post_init__(self) -> None:
        positive("weight_sync", self, "bucket_mb")
        is_used = self.transport == "disk" or self.folder is None
        require(is_used, "weight_sync.folder", self.folder, "null unless weight_sync.transport=disk")
        require(self.verify_every >= 0, "weight_sync.verify_every", self.verify_every, "0 or more")
        require(self.probe_tokens >= 0, "weight_sync.probe_tokens", self.probe_tokens, "0 (off) or more")
        limit = self.probe_limit
        require(limit is None or limit > 0, "weight_sync.probe_limit", limit, "null, or more than 0")
