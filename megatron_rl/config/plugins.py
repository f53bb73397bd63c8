"""Lookup of plug-ins, which are named by a registered name or by ``package.module:symbol``."""

import difflib
import importlib
from collections.abc import Mapping
from typing import TypeVar

from megatron_rl.config.foreign_names import suggest_value
from megatron_rl.errors import ConfigError

T = TypeVar("T")


def load_symbol(name: str, registered: Mapping[str, T], key: str) -> T:
    """Return the object that a name stands for.

    Args:
        name: a key of ``registered`` or ``package.module:symbol``.
        registered: built-in choices by name.
        key: dotted configuration key, for the message.

    Raises:
        ConfigError: the name is unknown, the module cannot be imported, or the symbol is missing or not callable.
    """
    if name in registered:
        return registered[name]
    module_name, separator, symbol = name.partition(":")
    if not separator:
        suggestion = suggest_value(key, name) or next(iter(difflib.get_close_matches(name, registered, n=1)), None)
        hint = f" Did you mean {suggestion}?" if suggestion else ""
        raise ConfigError(f"{key}={name!r}: expected one of {', '.join(registered)}, or package.module:symbol.{hint}")
    try:
        found = getattr(importlib.import_module(module_name), symbol)
    except ImportError as error:
        raise ConfigError(
            f"{key}={name!r}: module {module_name} cannot be imported ({error}). Is it on PYTHONPATH?"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"{key}={name!r}: module {module_name} has no {symbol!r}.") from error
    if not callable(found):
        raise ConfigError(f"{key}={name!r}: {symbol} is of type {type(found).__name__}, expected a callable.")
    return found
