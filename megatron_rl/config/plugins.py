"""The one way to name a plug-in: a registered name, or ``package.module:symbol``."""

import difflib
import importlib
from collections.abc import Mapping
from typing import TypeVar

from megatron_rl.errors import ConfigError

T = TypeVar("T")


def load_symbol(name: str, registered: Mapping[str, T], key: str) -> T:
    """What ``name`` stands for.

    Args:
        name: a key of ``registered`` or ``package.module:symbol``.
        registered: the built-in choices.
        key: the configuration key, for the message.

    Raises:
        ConfigError: unknown name, module that does not import, symbol that is missing or not callable.
    """
    if name in registered:
        return registered[name]
    module_name, separator, symbol = name.partition(":")
    if not separator:
        near = difflib.get_close_matches(name, registered, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key}={name!r}: expected one of {', '.join(registered)}, or package.module:symbol.{hint}")
    try:
        found = getattr(importlib.import_module(module_name), symbol)
    except ImportError as error:
        raise ConfigError(
            f"{key}={name!r}: module {module_name} does not import ({error}). Is it on PYTHONPATH?"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"{key}={name!r}: module {module_name} has no {symbol!r}.") from error
    if not callable(found):
        raise ConfigError(f"{key}={name!r}: {symbol} is a {type(found).__name__}, expected something callable.")
    return found
