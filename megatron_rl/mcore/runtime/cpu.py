"""Run Megatron-Core on machines without CUDA.

Megatron-Core names the CUDA device in dozens of ordinary code paths. Without CUDA, an import hook compiles
``megatron.core.*`` with those names replaced by the CPU's; ``torch.cpu`` offers the same stream and device calls. Line
numbers are preserved, nothing outside ``megatron.core`` changes, and with CUDA the hook is not installed. Checked with
megatron-core 0.16.1 to 0.19.2.
"""

import ctypes
import importlib.abc
import importlib.machinery
import re
import sys
from collections.abc import Sequence
from types import CodeType, ModuleType
from typing import Any

import torch

from megatron_rl.models import cpu_linear


def _stream_constructor(match: re.Match[str]) -> str:
    return "torch.cpu.Stream" + ("()" if match[1] else "")


def _cuda_method(match: re.Match[str]) -> str:
    """Replace ``x.cuda(...)`` by ``x.cpu()``, keeping a closing bracket that belongs to an enclosing call."""
    return ".cpu()" + ")" * (match[0].count(")") - match[0].count("("))


REPLACEMENTS = tuple(
    (re.compile(pattern, re.MULTILINE), replacement)
    for pattern, replacement in (
        # types such as 'torch.cuda.FloatTensor'
        (r"torch\.cuda\.(\w*Tensor)\b", r"torch.\1"),
        # CPU and "device" share one generator, so assertions that forking leaves the CPU's state unchanged cannot hold
        (r"torch\.cuda\.(random\.)?get_rng_state\(.*\)", "torch.get_rng_state()"),
        (r"torch\.cuda\.manual_seed\b", "torch.manual_seed"),
        (r"_lazy_call\(cb\)", "torch.set_rng_state(new_state)"),
        (r"if not torch\.all\(cpu_rng_state == .*:", "if False:"),
        # devices and streams
        (
            r"torch\.cuda\.(current_device|device_count|synchronize|set_device|stream|current_stream|Event)\b",
            r"torch.cpu.\1",
        ),
        (r"torch\.cuda\.Stream(\([^()]*(\(\))?[^()]*\))?", _stream_constructor),
        (r"torch\.cuda\.default_stream\b", "torch.cpu.current_stream"),
        (r"(?<!p)\.is_cuda\b", ".is_cpu"),
        (r"\S+\.record_stream\(.*\)$", "pass"),
        (r"(['\"])cuda\1", "'cpu'"),
        (r"\.cuda\(.*?\)\)?", _cuda_method),
        (r"pin_memory=True", "pin_memory=False"),
        # torch's matrix products are slow on AMD processors
        (r"\btorch\.matmul\((total_input|input), weight\.t\(\)\)", r"cpu_linear.matmul(\1, weight.t())"),
        (r"\bgrad_output\.matmul\(weight\)", "cpu_linear.matmul(grad_output, weight)"),
        (r"\bgrad_output\.t\(\)\.matmul\(total_input\)", "cpu_linear.matmul(grad_output.t(), total_input)"),
        # torch.compile at import takes minutes without a GPU
        (r"^enable_jit_fuser\(\)", "disable_jit_fuser()"),
    )
)


class _CpuLoader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path).decode()
        for pattern, replacement in REPLACEMENTS:
            source = pattern.sub(replacement, source)
        return compile(source, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["cpu_linear"] = cpu_linear  # the replacements refer to this name
        super().exec_module(module)


class _CpuFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _CpuLoader(name, spec.loader.path)
        return spec


def install() -> bool:
    """Install the import hook unless CUDA is available; return whether Megatron-Core is compiled for the CPU.

    Raises:
        RuntimeError: megatron.core is imported already.
    """
    if torch.cuda.is_available():
        return False
    if any(isinstance(finder, _CpuFinder) for finder in sys.meta_path):
        return True
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "megatron.core is imported already, but must be compiled for the CPU. "
            "Import megatron_rl.mcore before megatron.core."
        )
    _complete_torch_cpu()
    keep_memory()
    sys.meta_path.insert(0, _CpuFinder())
    return True


def keep_memory() -> None:
    """Let the C library keep freed memory, because the first access to a new page is a fault (1 µs or more).

    Uses one arena, because each of autograd's threads would keep memory in its own; and no mmap for a tensor below
    32 MiB, the largest threshold that glibc accepts.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        for option, value in ((-8, 1), (-3, 2**25), (-1, 2**31 - 1), (-2, 2**26)):
            mallopt(option, value)


def _complete_torch_cpu() -> None:
    """Add missing methods to the streams and events of torch.cpu; they do nothing, since the CPU runs in order."""
    stream: Any = torch.cpu.Stream
    event: Any = torch.cpu.Event
    stream.synchronize = lambda self: None
    stream.record_event = lambda self, recorded=None: recorded or event()
    event.__init__ = lambda self, *args, **kwargs: None
    event.elapsed_time = lambda self, end: 0.0
