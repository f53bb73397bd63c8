"""Stands in for SGLang's compiled kernels where there are none; every name raises when it is called.

On a CPU without AMX the layers take torch's own operations, so nothing of it is ever called. It must not define
``torch.ops.sgl_kernel.convert_weight_packed``, by which SGLang knows that AMX can be used.
"""

from typing import Any

__version__ = "0"


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} is compiled code, which this machine does not have.")

    missing.__name__ = name
    return missing
