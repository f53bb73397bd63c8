"""Console output: a live panel on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Literal, Protocol

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# (label, metric, format) of the numbers of a step; metrics that the step lacks are left out
COLUMNS = (
    ("reward", "critic/score/mean", "{:.3f}"),
    ("loss", "actor/loss", "{:.4f}"),
    ("loss", "reward_model/loss", "{:.4f}"),
    ("accuracy", "reward_model/accuracy", "{:.1%}"),
    ("length", "response_length/mean", "{:.1f}"),
    ("entropy", "actor/entropy", "{:.3f}"),
    ("kl", "actor/kl_loss", "{:.4f}"),
    ("grad", "actor/grad_norm", "{:.2f}"),
    ("grad", "reward_model/grad_norm", "{:.2f}"),
    ("mismatch", "train_rollout_logprob_abs_diff/mean", "{:.1e}"),
    ("s/step", "timing_s/step", "{:.2f}"),
)
TIMINGS = (
    "gen",
    "reward_model",
    "old_log_prob",
    "ref",
    "values",
    "adv",
    "update_critic",
    "update_actor",
    "update_reward_model",
    "update_weights",
    "testing",
    "save_checkpoint",
)
MAX_SAMPLE_CHARACTERS = 600


class Console(Protocol):
    """Shows the progress of a run to the user."""

    def note(self, text: str) -> None:
        """Print a line that stays on the screen."""
        ...

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Show the metrics of a step."""
        ...

    def sample(self, step: int, prompt: str, response: str, reward: float) -> None:
        """Show a prompt with its response and reward."""
        ...

    def close(self) -> None: ...


def build_console(
    mode: Literal["auto", "live", "plain", "silent"], *, name: str, num_steps: int, every: int
) -> Console:
    """The console of a run; auto is live on a terminal."""
    if mode == "silent":
        return SilentConsole()
    if mode == "live" or (mode == "auto" and sys.stdout.isatty()):
        return LiveConsole(name, num_steps)
    return PlainConsole(name, num_steps, every)


class SilentConsole:
    """Shows nothing; also the console of every rank but the first."""

    def note(self, text: str) -> None: ...

    def step(self, step: int, values: Mapping[str, float]) -> None: ...

    def sample(self, step: int, prompt: str, response: str, reward: float) -> None: ...

    def close(self) -> None: ...


class PlainConsole:
    """Prints one line every few steps."""

    def __init__(self, name: str, num_steps: int, every: int) -> None:
        self._name = name
        self._num_steps = num_steps
        self._every = every

    def note(self, text: str) -> None:
        print(text, flush=True)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        if step == 0 or (step % self._every and step != self._num_steps):
            return
        shown = "  ".join(
            f"{label} {form.format(values[metric])}" for label, metric, form in COLUMNS if metric in values
        )
        width = len(str(self._num_steps))
        print(f"{self._name}  step {step:>{width}}/{self._num_steps}  {shown}", flush=True)

    def sample(self, step: int, prompt: str, response: str, reward: float) -> None:
        print(
            f"{self._name}  sample at step {step}: {_shorten(prompt)!r} -> {_shorten(response)!r}  reward {reward:g}",
            flush=True,
        )

    def close(self) -> None:
        sys.stdout.flush()


class LiveConsole:
    """Shows progress, metrics, timings and the latest sample in a panel that is redrawn in place."""

    def __init__(self, name: str, num_steps: int) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task(name, total=num_steps)
        self._values: Mapping[str, float] = {}
        self._sample: Text | None = None
        self._drawn = 0.0
        self._live = Live(self._render(), console=RichConsole(), auto_refresh=False)
        self._live.start()

    def note(self, text: str) -> None:
        self._live.console.print(text, highlight=False)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        self._progress.update(self._task, completed=step)
        self._values = values
        self._draw()

    def sample(self, step: int, prompt: str, response: str, reward: float) -> None:
        self._sample = Text.assemble(
            (f"step {step}, reward {reward:g}\n", "dim"),
            _shorten(prompt),
            (_shorten(response), "bold green" if reward > 0 else "bold red"),
        )
        self._draw(now=True)

    def close(self) -> None:
        self._draw(now=True)
        self._live.stop()

    def _draw(self, *, now: bool = False) -> None:
        if now or time.monotonic() - self._drawn > 0.2:
            self._drawn = time.monotonic()
            self._live.update(self._render(), refresh=True)

    def _render(self) -> Panel:
        numbers = Table.grid(padding=(0, 3))
        shown = [
            (label, form.format(self._values[metric])) for label, metric, form in COLUMNS if metric in self._values
        ]
        if shown:
            numbers.add_row(*(Text(label, style="dim") for label, _ in shown))
            numbers.add_row(*(Text(value, style="bold") for _, value in shown))
        spans = [(name, self._values[f"timing_s/{name}"]) for name in TIMINGS if f"timing_s/{name}" in self._values]
        timings = Text("  ".join(f"{name} {seconds:.2f}s" for name, seconds in spans), style="dim")
        parts: list[Progress | Table | Text | Panel] = [self._progress, numbers, timings]
        if self._sample is not None:
            parts.append(Panel(self._sample, title="sample", title_align="left", border_style="dim"))
        return Panel(Group(*parts), title="megatron_rl", title_align="left")


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_SAMPLE_CHARACTERS else text[:MAX_SAMPLE_CHARACTERS] + " …"
