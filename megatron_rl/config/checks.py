"""Value checks shared by the configuration sections."""

from megatron_rl.errors import ConfigError


def require(holds: bool, key: str, value: object, expected: str, change: str = "") -> None:
    """Raise an error about one key unless a condition holds.

    Args:
        holds: the condition.
        key: dotted configuration key.
        value: its value.
        expected: values that are allowed; follows the word "expected".
        change: sentence that says what to change.

    Raises:
        ConfigError: the condition does not hold.
    """
    if not holds:
        raise ConfigError(f"{key}={value}: expected {expected}." + (f" {change}" if change else ""))


def positive(prefix: str, section: object, *names: str) -> None:
    """Raise an error unless every named field of a section is at least 1 or null.

    Args:
        prefix: dotted key of the section.
        section: instance of the section.
        names: fields to check.

    Raises:
        ConfigError: a field is below 1.
    """
    for name in names:
        value = getattr(section, name)
        require(value is None or value >= 1, f"{prefix}.{name}", value, "at least 1")
