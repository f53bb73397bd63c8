"""Hardware descriptions: memory, compute and bandwidth of a cluster."""

from dataclasses import dataclass, fields
from pathlib import Path

from megatron_rl.config.load import load_as
from megatron_rl.errors import ConfigError
from megatron_rl.models.flops import PEAK_TFLOPS


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A cluster of identical nodes; each rank has one device."""

    name: str
    ranks_per_node: int
    """Devices per node."""
    device_gb: float
    """Memory of a device, in units of 1e9 bytes."""
    host_gb: float
    """Memory of a node's host, in units of 1e9 bytes."""
    tflops: float
    """Peak TFLOP/s of dense bf16 matrix products."""
    fp8_tflops: float
    """Peak TFLOP/s of dense FP8 matrix products; the same as ``tflops`` if the device has no FP8."""
    memory_gb_s: float
    """Peak bandwidth of a device's memory."""
    link_gb_s: float
    """Peak bandwidth between devices of a node, in one direction."""
    network_gb_s: float
    """Peak bandwidth between nodes, per device, in one direction."""
    host_link_gb_s: float
    """Peak bandwidth between a device and its host, in one direction."""
    base_gb: float
    """Memory used on every device before a model is built: contexts, libraries, communication buffers."""
    process_gb: float = 3.0
    """Host memory of a rank's process: interpreter and libraries."""
    engine_cache_gb: float | None = None
    """Size of an engine's KV cache if it is fixed; null: it is a share of the device's memory."""
    fragmentation: float = 0.05
    """Memory that the allocator reserves beyond what is in use, as a share of the activations."""
    matmul_efficiency: float = 0.45
    """Share of the peak that a forward and backward pass of a model reaches."""
    bandwidth_efficiency: float = 0.6
    """Share of the peak bandwidth of memory and links that is reached."""
    kernel_s: float = 5e-6
    """Seconds of a kernel launch, the cost of an operation too small to count otherwise."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "name" or (value is None and field.default is None):
                continue
            if not (isinstance(value, int | float) and value >= 0):
                raise ConfigError(f"hardware {self.name}: {field.name}={value!r}: expected a number, 0 or more.")


# Sources: NVIDIA's data sheets of A100 SXM4 80 GB, H100 SXM5 and H200 SXM (dense figures; NVLink in one direction), one
# network interface of 200 (A100) or 400 Gb/s for each device. The efficiencies are assumptions; none is measured.
KNOWN_HARDWARE = {
    hardware.name: hardware
    for hardware in (
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
# part of the device's name -> name in KNOWN_HARDWARE
DEVICES = {"A100": "a100-80g", "A800": "a100-80g", "H100": "h100-80g", "H800": "h100-80g", "H200": "h200-141g"}


def read_hardware(name: str) -> Hardware:
    """Return a known hardware description, or read one from a YAML file.

    ``python tools/doctor.py --measure FILE`` writes such a file.

    Args:
        name: a name in KNOWN_HARDWARE, or the path of a YAML file.

    Raises:
        ConfigError: the name is neither, or the file lacks a value or has an unknown one.
    """
    if name in KNOWN_HARDWARE:
        return KNOWN_HARDWARE[name]
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"hardware {name!r} is not known. Choose one of {', '.join(KNOWN_HARDWARE)}, or give a YAML file."
        )
    return load_as(Hardware, path)
