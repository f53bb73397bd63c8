"""Metric sinks: metrics.jsonl is complete and authoritative, wandb and tensorboard are copies."""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_rl.errors import MegatronRLError


class Sink(Protocol):
    """Receives the metrics of every step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """Writes one JSON object per step; rows beyond the resumed step move to ``*.discarded.jsonl``."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self._path = path
        _set_aside(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": step, **{name: value if math.isfinite(value) else None for name, value in values.items()}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorboardSink:
    """Writes TensorBoard event files."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Writes to Weights & Biases, offline without an API key; the run id stays the same after a resume."""

    def __init__(
        self,
        folder: Path,
        *,
        mode: Literal["auto", "online", "offline"],
        project: str,
        name: str,
        run_id: str,
        config: dict[str, Any],
    ) -> None:
        import wandb

        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"

        def start(mode: Literal["online", "offline"]) -> Any:
            return wandb.init(
                project=project,
                name=name,
                id=run_id,
                resume="allow",
                mode=mode,
                dir=str(folder),
                config=config,
                settings=wandb.Settings(silent=True),
            )

        self._failures = (wandb.errors.Error, OSError)
        try:
            self._run = start(mode)
        except self._failures as error:
            if mode == "offline":
                raise MegatronRLError(f"wandb cannot start: {error}. Set metrics.wandb=disabled.") from error
            warn(f"wandb cannot be reached ({error}); it writes to {folder}/wandb. Run `wandb sync` later.")
            self._run = start("offline")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._try(lambda: self._run.log(dict(values), step=step))

    def close(self) -> None:
        self._try(lambda: self._run.finish())

    def _try(self, call: Callable[[], object]) -> None:
        """Call wandb; an outage does not stop the run, because metrics.jsonl has everything."""
        if self._run is None:
            return
        try:
            call()
        except self._failures as error:
            warn(f"wandb failed ({error}) and is disabled for the rest of this run; metrics.jsonl is complete")
            self._run = None


def warn(text: str) -> None:
    """Print a warning to stderr, because stdout belongs to the console."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All complete rows of a JSONL file; a line that a crash has cut off is skipped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _set_aside(path: Path, resumed_step: int) -> None:
    if not path.exists():
        return
    kept: list[str] = []
    beyond: list[str] = []
    for row in read_rows(path):
        (kept if row["step"] <= resumed_step else beyond).append(json.dumps(row) + "\n")
    if beyond:
        with path.with_suffix(".discarded.jsonl").open("a", encoding="utf-8") as discarded:
            discarded.writelines(beyond)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)
