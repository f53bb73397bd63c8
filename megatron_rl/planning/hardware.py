"""What machines can do."""

from dataclasses import dataclass, fields
from pathlib import Path

from megatron_rl.config.load import load_as
from megatron_rl.errors import ConfigError
from megatron_rl.models.flops import PEAK_TFLOPS


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A cluster of equal nodes; a rank has one device."""

    name: str
    ranks_per_node: int
    """Devices of a node."""
    device_gb: float
    """Memory of a device, in units of 1e9 bytes."""
    host_gb: float
    """Memory of a node's host, in units of 1e9 bytes."""
    tflops: float
    """Dense products in bf16, peak."""
    fp8_tflops: float
    """Dense products in FP8, peak; the same as ``tflops`` where there is no FP8."""
    memory_gb_s: float
    """Bandwidth of a device's memory, peak."""
    link_gb_s: float
    """Between devices of a node, in one direction, peak."""
    network_gb_s: float
    """Between nodes, for each device, in one direction, peak."""
    host_link_gb_s: float
    """Between a device and its host, in one direction, peak."""
    base_gb: float
    """On every device before anything is built: contexts, libraries, communication buffers."""
    process_gb: float = 3.0
    """Of a rank on its host: interpreter and libraries."""
    engine_cache_gb: float | None = None
    """Of an engine's cache where it is not a share of the device; null: it is."""
    fragmentation: float = 0.05
    """What the allocator keeps beyond what is in use, as a share of the activations."""
    matmul_efficiency: float = 0.45
    """Share of the peak that a whole forward and backward pass reaches."""
    bandwidth_efficiency: float = 0.6
    """Share of the peaks of memory and links that is reached."""
    kernel_s: float = 5e-6
    """Of an operation too small to matter otherwise."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "name" or (value is None and item.default is None):
                continue
            if not (isinstance(value, int | float) and value >= 0):
                raise ConfigError(f"hardware {self.name}: {item.name}={value!r}: expected a number, 0 or more.")


# Sources: NVIDIA's data sheets of A100 SXM4 80 GB, H100 SXM5 and H200 SXM (dense figures; NVLink in one direction), one
# network interface of 200 (A100) or 400 Gb/s for each device. The efficiencies are assumptions, none of them measured.
KNOWN = {
    one.name: one
    for one in (
        Hardware(
            name="a100-80g", ranks_per_node=8, device_gb=85.0, host_gb=1000.0,
            tflops=PEAK_TFLOPS["A100"], fp8_tflops=PEAK_TFLOPS["A100"], memory_gb_s=2039.0,
            link_gb_s=300.0, network_gb_s=25.0, host_link_gb_s=25.0, base_gb=3.0,
        ),
        Hardware(
            name="h100-80g", ranks_per_node=8, device_gb=85.0, host_gb=2000.0,
            tflops=PEAK_TFLOPS["H100"], fp8_tflops=1979.0, memory_gb_s=3350.0,
            link_gb_s=450.0, network_gb_s=50.0, host_link_gb_s=50.0, base_gb=3.0,
        ),
        Hardware(
            name="h200-141g", ranks_per_node=8, device_gb=150.0, host_gb=2000.0,
            tflops=PEAK_TFLOPS["H200"], fp8_tflops=1979.0, memory_gb_s=4800.0,
            link_gb_s=450.0, network_gb_s=50.0, host_link_gb_s=50.0, base_gb=3.0,
        ),
    )
}  # fmt: skip
# part of the device's name -> description
DEVICES = {"A100": "a100-80g", "A800": "a100-80g", "H100": "h100-80g", "H800": "h100-80g", "H200": "h200-141g"}


def read_hardware(name: str) -> Hardware:
    """A known description, or one from a YAML file (python tools/doctor.py --measure FILE writes it).

    Raises:
        ConfigError: it is neither, or the file lacks a value or has another one.
    """
    if name in KNOWN:
        return KNOWN[name]
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"hardware {name!r} is not known. Choose one of {', '.join(KNOWN)}, or give a YAML file.")
    return load_as(Hardware, path)
