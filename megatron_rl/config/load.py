"""Read a configuration: defaults < YAML files (one ``base:`` chain) < ``key=value`` overrides."""

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_rl.config.foreign_names import suggest, suggest_value
from megatron_rl.config.schema import RunConfig
from megatron_rl.errors import ConfigError

T = TypeVar("T")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the configuration of a training run; see ``load_as``."""
    return load_as(RunConfig, path, overrides)


def load_as(schema: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file with its bases and overrides into a frozen configuration.

    Args:
        schema: dataclass of the configuration.
        path: YAML file; its ``base:`` names another one that it extends.
        overrides: key=value texts, which take precedence over the files.

    Raises:
        ConfigError: a file is missing or not YAML, a base chain loops, a key is unknown,
            a required key is missing, or a value has the wrong type or range.
    """
    layers = [*_read_chain(Path(path)), *(_parse_override(text) for text in overrides)]
    known = sorted(_dotted_keys(schema))
    for origin, layer in layers:
        _check_keys(layer, schema, "", known, origin)
    try:
        merged = OmegaConf.structured(schema)
        for origin, layer in layers:
            merged = _merge(merged, layer, origin)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(
                f"{path}: required keys are not set: {', '.join(missing)}. Set them in the file or as key=value."
            )
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key or ''}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, schema)
    return config


def dump_config(config: Any) -> str:
    """Return a configuration as YAML text, from which ``load_config`` reads an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def defaults() -> dict[str, Any]:
    """Return dotted key -> default of every key that has one, as plain values."""
    return {
        key: value for key, value in _leaves(OmegaConf.to_container(OmegaConf.structured(RunConfig))) if value != "???"
    }


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value of every leaf of a configuration or section.

    Args:
        config: dataclass instance.
        prefix: text that is put before every key.
    """
    leaves: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value, key = getattr(config, item.name), prefix + item.name
        leaves |= flatten(value, key + ".") if dataclasses.is_dataclass(value) else {key: value}
    return leaves


def _merge(merged: Any, layer: dict[str, Any], origin: str) -> Any:
    try:
        return OmegaConf.merge(merged, layer)
    except OmegaConfBaseException as error:
        suggestion = None
        if error.full_key:
            suggestion = suggest_value(error.full_key, OmegaConf.select(OmegaConf.create(layer), error.full_key))
        hint = f". Did you mean {suggestion}?" if suggestion else ""
        raise ConfigError(f"{origin}: {error.full_key}: {str(error).splitlines()[0]}{hint}") from error


def _read_chain(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read a file and its bases; the innermost base comes first."""
    chain: list[tuple[str, dict[str, Any]]] = []
    seen: list[Path] = []
    while True:
        resolved = path.resolve()
        if resolved in seen:
            raise ConfigError(
                f"base chain loops: {' -> '.join(str(p) for p in [*seen, resolved])}. Remove one of the base: keys."
            )
        seen.append(resolved)
        content = read_yaml(path)
        base = content.pop("base", None)
        chain.insert(0, (str(path), content))
        if base is None:
            return chain
        path = path.parent / str(base)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Raises:
        ConfigError: the file is missing or not YAML, or its content is not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror or error}. Give the path of a YAML file.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"config file {path} contains a {type(content).__name__}: expected sections such as run:, model:, data:."
        )
    return content


def _parse_override(text: str) -> tuple[str, dict[str, Any]]:
    key, separator, _ = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {text!r}: expected key=value, for instance optimizer.lr=1e-6.")
    try:
        layer = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"override {text!r}: {str(error).splitlines()[0]}") from error
    assert isinstance(layer, dict)
    return f"override {text!r}", typing.cast(dict[str, Any], layer)


def _section_type(annotation: Any) -> type | None:
    """Return the dataclass in an annotation such as ``SourceSection | None`` or ``list[Section]``, or None."""
    candidates = [annotation, *typing.get_args(annotation)]
    return next((c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), None)


def _dotted_keys(section: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(section)
    for item in dataclasses.fields(section):
        yield prefix + item.name
        inner = _section_type(hints[item.name])
        if inner is not None:
            yield from _dotted_keys(inner, f"{prefix}{item.name}.")


def _check_keys(layer: Any, section: type, prefix: str, known: list[str], origin: str) -> None:
    hints = typing.get_type_hints(section)
    if not isinstance(layer, dict | DictConfig):
        if layer is None:
            return
        raise ConfigError(
            f"{origin}: {prefix.rstrip('.')} is {layer!r}: expected a section with keys {', '.join(map(str, hints))}."
        )
    for key, value in layer.items():
        dotted = prefix + str(key)
        if key not in hints:
            dotted = _first_leaf(dotted, value)
            suggestion = suggest(dotted, known)
            where = prefix.rstrip(".") or "the top level"
            hint = f" Did you mean {suggestion}?" if suggestion else f" Keys of {where}: {', '.join(hints)}."
            raise ConfigError(f"{origin}: unknown key {dotted}.{hint}")
        inner = _section_type(hints[key])
        if inner is None:
            continue
        for element in value if isinstance(value, list) else [value]:
            _check_keys(element, inner, f"{dotted}.", known, origin)


def _first_leaf(dotted: str, value: Any) -> str:
    """Return the dotted key of the first leaf in an unknown section, or the key itself if it has no keys."""
    while isinstance(value, dict) and value:
        key, value = next(iter(value.items()))
        dotted += f".{key}"
    return dotted
