"""Conversion side by side with copying the same files: python tools/bench/convert.py [--models NAME …] [--rounds N].

Random bf16 weights of real models' shapes. Each round copies the Hugging Face folder with ``cp``, converts it to
Megatron and back, one after the other, each with the bytes forced to the disk; the result of the way back is
compared with what it began with, bit for bit. Printed: GB/s, the ratio to ``cp`` in the same round, and the
peak resident memory of the converter.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contenders.report import Spread

TOOLS = Path(__file__).parents[1]
MODELS = ("qwen2.5-1.5b", "qwen2.5-7b")
COPY, FORTH, BACK = "cp", "HF to Megatron", "Megatron to HF"


class BenchFailed(RuntimeError):
    """A command failed, or the tensors that came back are not those that went out."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One command."""

    seconds: float
    peak_rss_bytes: int


def measure(command: list[str]) -> Measured:
    """Run a command until its output is on the disk.

    Raises:
        BenchFailed: it ended with another status than 0.
    """
    os.sync()
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            output.seek(0)
            raise BenchFailed(f"{' '.join(command)} ended with {process.returncode}:\n{output.read().decode()}")
    os.sync()
    return Measured(seconds=time.perf_counter() - start, peak_rss_bytes=usage.ru_maxrss * 1024)


def apart(function: Callable[..., None], *arguments: Any) -> None:
    """Call it in a process of its own: a child's peak memory begins at that of the process that starts it."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise BenchFailed(f"{function.__name__} failed")


def touch_memory(num_bytes: int) -> None:
    """Use so much memory and give it back.

    A virtual machine's host provides memory when it is first used, which can take longer than all the rest; with
    this every command finds pages for what it writes.
    """
    kept = []
    for _ in range(0, num_bytes, 2**26):
        kept.append(bytearray(b"1" * 2**26))


def free_memory() -> int:
    """Bytes that nothing uses, not even as a cache of files."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemFree"].split()[0]) * 1024


def write_model(folder: Path, name: str) -> None:
    """Random weights of that model's shapes."""
    from random_checkpoint import QWEN25_1_5B, QWEN25_7B, write_random_checkpoint

    write_random_checkpoint(folder, dict(zip(MODELS, (QWEN25_1_5B, QWEN25_7B), strict=True))[name])


def check_same(first: Path, second: Path) -> None:
    """Every tensor of two Hugging Face folders is the same, bit for bit."""
    import torch

    from megatron_rl.weights.hf_files import HFReader

    one, two = HFReader(first), HFReader(second)
    assert set(one.names()) == set(two.names())
    for name in one.names():
        left, right = (reader.read(name, (slice(None),)) for reader in (one, two))
        assert left.dtype == right.dtype, name
        assert torch.equal(left.view(torch.int16), right.view(torch.int16)), name


def bench(name: str, folder: Path, *, rounds: int, workers: int | None) -> dict[str, list[Measured]]:
    """Some rounds of copying and converting."""
    source, copy, megatron, back = (folder / part for part in ("hf", "copy", "megatron", "back"))
    apart(write_model, source, name)
    options = [] if workers is None else ["--workers", str(workers)]

    def tool(script: str, given: Path, wanted: Path) -> list[str]:
        return [sys.executable, str(TOOLS / script), "--input", str(given), "--output", str(wanted), *options]

    commands = {
        COPY: ["cp", "-r", str(source), str(copy)],
        FORTH: tool("convert_hf_to_megatron.py", source, megatron),
        BACK: tool("convert_megatron_to_hf.py", megatron, back),
    }
    size = sum(path.stat().st_size for path in source.iterdir())
    measured: dict[str, list[Measured]] = {what: [] for what in commands}
    for _ in range(rounds):
        for what, command in commands.items():
            apart(touch_memory, min(size, free_memory() // 2))
            measured[what].append(measure(command))
            shutil.rmtree(copy, ignore_errors=True)
        apart(check_same, source, back)
        shutil.rmtree(megatron)
        shutil.rmtree(back)
    return measured


def report(name: str, size: int, measured: dict[str, list[Measured]]) -> str:
    """A table of one model."""
    copied = [one.seconds for one in measured[COPY]]
    lines = [f"{name}, {size / 1e9:.2f} GB", f"{'':16}{'GB/s':>14}{'of cp':>16}{'peak memory':>14}"]
    for what, runs in measured.items():
        speed = _text([size / 1e9 / one.seconds for one in runs])
        ratio = _text([copy / one.seconds for copy, one in zip(copied, runs, strict=True)])
        peak = max(one.peak_rss_bytes for one in runs) / 1e9
        lines.append(f"{what:16}{speed:>14}{ratio:>16}{f'{peak:.2f} GB':>14}")
    return "\n".join(lines)


def _text(values: list[float]) -> str:
    return Spread.of(values).text(2) if len(values) > 1 else f"{values[0]:.2f}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time conversion against cp.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, help="threads of the converter (default: its own)")
    parser.add_argument("--folder", help="where to work: four times the model's size (default: the temporary folder)")
    parser.add_argument("--json", help="write every measured command there")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    for name in arguments.models:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            measured = bench(name, Path(folder), rounds=arguments.rounds, workers=arguments.workers)
            size = sum(path.stat().st_size for path in (Path(folder) / "hf").glob("*.safetensors"))
        print(report(name, size, measured), flush=True)
        found[name] = {"bytes": size, **{what: [asdict(one) for one in runs] for what, runs in measured.items()}}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
