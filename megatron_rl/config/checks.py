"""What the sections check of themselves."""

from megatron_rl.errors import ConfigError


def require(holds: bool, key: str, value: object, expected: str, change: str = "") -> None:
    """
    Raises:
        ConfigError: the key with its value, what was expected and what to change, unless the check holds.
    """
    if not holds:
        raise ConfigError(f"{key}={value}: expected {expected}." + (f" {change}" if change else ""))


def positive(prefix: str, section: object, *names: str) -> None:
    """Fields of a section that must be at least 1, or null."""
    for name in names:
        value = getattr(section, name)
        require(value is None or value >= 1, f"{prefix}.{name}", value, "at least 1")
