"""Checks of a host that one of its ranks makes alone."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megatron_rl.config import RunConfig
from megatron_rl.data.templates import load_tokenizer
from megatron_rl.doctor.finding import Finding, error, ok, warning
from megatron_rl.errors import MegatronRLError
from megatron_rl.mcore.model.gpt_model import check_weights
from megatron_rl.models import read_model_spec
from megatron_rl.planning.this_machine import host_memory_gb

PACKAGES = ("torch", "megatron-core", "transformer-engine", "vllm", "sglang", "transformers", "omegaconf")
# distribution -> (lowest, first excluded) version that this package has been tested with
TESTED_VERSIONS = {"megatron-core": ((0, 16, 1), (0, 20)), "vllm": ((0, 20), (0, 33)), "sglang": ((0, 5, 11), (0, 6))}
MIN_HOST_GB = 4.0
MIN_DISK_GB = 10.0
WRITE_MB = 64
SLOW_WRITE_MB_S = 50.0


def check_host(config: RunConfig | None) -> Iterator[Finding]:
    """Run all checks of a host.

    Args:
        config: configuration of the run; None skips the checks that need a model, an engine or a run folder.
    """
    yield from versions(config)
    yield from devices()
    yield memory()
    folder = Path(config.run.output_dir if config is not None else ".")
    yield disk(folder)
    yield file_system(folder)
    if config is not None:
        yield from model(config)
        yield engine(config)


def versions(config: RunConfig | None) -> Iterator[Finding]:
    """Check the versions of Python and the main packages, and whether they are compatible."""
    version_of = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            version_of[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    yield ok("versions", ", ".join(f"{name} {version}" for name, version in version_of.items()))
    for name, (lowest, below) in TESTED_VERSIONS.items():
        if name in version_of and not lowest <= version_numbers(version_of[name]) < below:
            span = f"{'.'.join(map(str, lowest))} to below {'.'.join(map(str, below))}"
            yield warning("versions", f"{name} {version_of[name]}", f"tested with {span}: pip install one of these")
    for name in ("torchvision", "torchaudio"):
        yield from _fits_torch(name, version_of["torch"])
    if torch.cuda.is_available() and "transformer-engine" not in version_of:
        yield warning("versions", "no Transformer Engine", "pip install transformer-engine[pytorch] for speed and FP8")
    if config is not None and config.precision.fp8 != "disabled" and "transformer-engine" not in version_of:
        yield error("versions", "no Transformer Engine", "install it, or set precision.fp8=disabled")


def version_numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (0, 16, 1) of 0.16.1rc0+cpu."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match is not None else ()


def _fits_torch(name: str, torch_version: str) -> Iterator[Finding]:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return
    failure = _import_failure(name)
    if failure:
        yield error("versions", f"{name} does not fit torch {torch_version}: {failure}", f"pip uninstall {name}")


def _import_failure(name: str) -> str:
    """Return why a package cannot be imported, tested in a separate process; empty if it can."""
    done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, check=False)
    return (done.stderr.strip().splitlines() or ["?"])[-1] if done.returncode else ""


def devices() -> Iterator[Finding]:
    """Check GPUs: memory used by other processes, errors, throttling, peer access."""
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            yield error(
                "gpu",
                "nvidia-smi is installed, but torch finds no GPU",
                "install a CUDA build of torch; check the driver",
            )
        else:
            yield ok("gpu", f"none; {os.cpu_count()} CPUs")
        return
    count = torch.cuda.device_count()
    names = {torch.cuda.get_device_name(index) for index in range(count)}
    yield ok("gpu", f"{count} x {', '.join(sorted(names))}")
    for index in range(count):
        try:
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError as failure:
            yield error(
                "gpu",
                f"GPU {index} cannot be used: {failure}",
                "end the processes that use it (nvidia-smi), or drain the node",
            )
            continue
        if free < 0.95 * total:
            used = (total - free) / 1e9
            yield warning(
                "gpu",
                f"GPU {index}: {used:.1f} of {total / 1e9:.1f} GB are in use",
                "end the processes that use it (nvidia-smi)",
            )
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    unconnected = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if unconnected:
        yield warning(
            "gpu",
            f"no peer access between {len(unconnected)} pairs of GPUs",
            "check nvidia-smi topo -m; TP will be slow",
        )
    yield from _health()


def _health() -> Iterator[Finding]:
    """Check for GPU errors and throttling that nvidia-smi reports."""
    if not shutil.which("nvidia-smi"):
        return
    fields = "index,ecc.errors.uncorrected.volatile.total,clocks_throttle_reasons.hw_slowdown"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        yield error("gpu", "nvidia-smi does not respond", "drain the node and inspect its GPUs")
        return
    rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines()]
    if done.returncode or any(len(row) != len(fields.split(",")) for row in rows):
        yield warning(
            "gpu", f"nvidia-smi printed {done.stdout.strip() or done.stderr.strip()!r}", "inspect the node's GPUs"
        )
        return
    for index, errors, throttled in rows:
        if errors.isdigit() and int(errors):
            yield error("gpu", f"GPU {index}: {errors} uncorrected memory errors", "drain the node and reset the GPU")
        if throttled == "Active":
            yield warning("gpu", f"GPU {index} is slowed down by its hardware", "check its cooling and power")


def memory() -> Finding:
    """Check the available memory of the host."""
    available = host_memory_gb("MemAvailable")
    detail = f"{available:.1f} of {host_memory_gb('MemTotal'):.1f} GB are available"
    if available < MIN_HOST_GB:
        return error("memory", detail, f"end other processes: at least {MIN_HOST_GB:.0f} GB are needed")
    return ok("memory", detail)


def disk(folder: Path) -> Finding:
    """Check the free disk space of the run folder."""
    parent = nearest_existing(folder)
    free = shutil.disk_usage(parent).free / 1e9
    detail = f"{free:.0f} GB are free in {parent}"
    if free < MIN_DISK_GB:
        return error("disk", detail, "free some space, lower checkpoint.keep_last, or choose another run.output_dir")
    return ok("disk", detail)


def file_system(folder: Path) -> Finding:
    """Check that the run folder is writable, and its write speed."""
    path = nearest_existing(folder) / f".doctor-{uuid.uuid4().hex}"
    content = os.urandom(2**20)
    try:
        start = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(WRITE_MB):
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        rate = WRITE_MB * 2**20 / 1e6 / (time.perf_counter() - start)
    except OSError as failure:
        return error(
            "file system", f"{path.parent} is not writable: {failure.strerror}", "choose another run.output_dir"
        )
    finally:
        path.unlink(missing_ok=True)
    if rate < SLOW_WRITE_MB_S:
        return warning(
            "file system",
            f"{path.parent} is written at {rate:.0f} MB/s",
            "checkpoints will be slow: use a faster file system",
        )
    return ok("file system", f"{path.parent} is writable")


def nearest_existing(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def model(config: RunConfig) -> Iterator[Finding]:
    """Check that weights and tokenizer can be read."""
    path = config.model.path

    def weights() -> str:
        spec = read_model_spec(path)
        check_weights(spec, path)
        return f"{path}: {spec.family}, {spec.num_layers} layers"

    def tokenizer() -> str:
        return f"tokenizer of {len(load_tokenizer(path))} tokens"

    for check, read in (("model", weights), ("tokenizer", tokenizer)):
        yield attempt(check, read)


def attempt(check: str, read: Callable[[], str]) -> Finding:
    """Return a finding with what a function returns, or with the error that it raises."""
    try:
        return ok(check, read())
    except MegatronRLError as failure:
        return error(check, str(failure), "see above")


def engine(config: RunConfig) -> Finding:
    """Check that the engine's package can be imported."""
    name = config.rollout.engine
    if name == "embedded":
        return ok("engine", "embedded needs nothing")
    failure = _import_failure(name)
    if failure:
        return error("engine", f"{name} cannot be imported: {failure}", "see docs/engines.md for how to install it")
    return ok("engine", f"{name} can be imported")
