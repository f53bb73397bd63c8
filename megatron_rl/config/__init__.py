"""Configuration: dataclass schema, YAML files with a chain of bases, key=value overrides, checks."""

from megatron_rl.config.load import dump_config, load_config
from megatron_rl.config.schema import RunConfig
from megatron_rl.config.validate import validate

__all__ = ["RunConfig", "dump_config", "load_config", "validate"]
