"""Placeholder for SGLang's compiled kernels on machines without them: every attribute raises when called.

On a CPU without AMX, SGLang's layers use torch's own operations, so nothing here is called. This module must not define
``torch.ops.sgl_kernel.convert_weight_packed``: SGLang takes its existence as a sign that AMX can be used.
"""

from typing import Any

__version__ = "0"


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} is a compiled kernel, which is not installed on this machine.")

    missing.__name__ = name
    return missing
