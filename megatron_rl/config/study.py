"""Configuration of a study, a comparison of several runs: python tools/analysis/ablate.py FILE."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_rl.config.checks import require
from megatron_rl.config.load import read_yaml
from megatron_rl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One of the compared runs."""

    config: str
    """Configuration file of the run."""
    overrides: list[str] = field(default_factory=list)
    """key=value overrides of the run, applied after those of the study."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Runs to compare, each repeated over the same seeds."""

    metric: str
    """Metric that the curves show, for instance val/exact_match."""
    runs: dict[str, StudyRun]
    """Name of a run in table and plot -> the run."""
    seeds: list[int]
    """Values of run.seed; every run is repeated for each."""
    num_ranks: int = 1
    """Processes (ranks) of a run."""
    overrides: list[str] = field(default_factory=list)
    """key=value overrides of all runs; {seed} is replaced by the seed."""

    def __post_init__(self) -> None:
        require(bool(self.runs), "runs", self.runs, "at least one run")
        require(bool(self.seeds), "seeds", self.seeds, "at least one seed")
        require(self.num_ranks >= 1, "num_ranks", self.num_ranks, "1 or more")
        folders = {self.folder_of(name): name for name in self.runs}
        duplicates = [name for name in self.runs if folders[self.folder_of(name)] != name]
        require(not duplicates, "runs", duplicates, "names that differ in letters and digits, which name the folders")

    def folder_of(self, run: str) -> str:
        """Name of the folder of a run."""
        return "".join(letter if letter.isalnum() else "_" for letter in run)

    def overrides_of(self, run: str, seed: int) -> list[str]:
        """The key=value overrides of one run with one seed."""
        overrides = [*self.overrides, *self.runs[run].overrides]
        return [text.replace("{seed}", str(seed)) for text in overrides] + [f"run.seed={seed}"]


def load_study(path: str | Path) -> Study:
    """Read the study in a YAML file.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown or missing, or a value has the wrong type.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Study), read_yaml(Path(path)))
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{path}: required keys are not set: {', '.join(missing)}.")
        study = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key or ''}: {str(error).splitlines()[0]}") from error
    assert isinstance(study, Study)
    return study
