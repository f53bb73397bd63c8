"""Run a conversion: resume, check free disk space, process the units of work, publish the result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.conversion.partial_folder import PartialFolder, Record, check_free_disk, writing
from megatron_rl.conversion.ranks import Ranks
from megatron_rl.conversion.work import Progress, run_units


@dataclass(frozen=True, kw_only=True)
class Job:
    """A conversion as units of work; ``folder`` is always the folder that is being written."""

    title: str
    """Title of the progress bar."""
    plan: Record
    """Input and options; an interrupted conversion resumes only if they are equal."""
    sizes: Sequence[int]
    """Bytes of each unit of work."""
    prepare: Callable[[Path], None]
    """(folder): called on one rank before the units."""
    write: Callable[[Path, int, Progress], Record]
    """(folder, unit, progress) -> record of the unit: write one unit."""
    is_intact: Callable[[Path, int, Record], bool]
    """(folder, unit, record): whether the unit, written by an earlier attempt, is still intact on disk."""
    complete: Callable[[Path, list[Record]], None]
    """(folder, records of all units): called on one rank after the units."""


def run_job(job: Job, target: Path, *, workers: int, ranks: Ranks) -> None:
    """Run a job; collective over the ranks.

    Args:
        target: folder to create.
        workers: threads of each rank.

    Raises:
        ConversionError: on every rank, if the job fails; running the job again resumes it.
    """
    with PartialFolder(target, job.plan, ranks) as partial:
        folder = partial.folder
        done = {unit for unit, record in partial.done.items() if job.is_intact(folder, unit, record)}
        todo = [unit for unit in range(len(job.sizes)) if unit not in done]
        todo_bytes = sum(job.sizes[unit] for unit in todo)

        def begin() -> None:
            if ranks.is_main:
                check_free_disk(target, todo_bytes)
                with writing(target):
                    job.prepare(folder)

        ranks.together(begin)
        progress = Progress(job.title, sum(job.sizes), ranks)
        if ranks.is_main:
            progress.add(sum(job.sizes) - todo_bytes)

        def do(unit: int) -> None:
            with writing(target):
                record = job.write(folder, unit, progress)
            partial.record(unit, record)

        run_units(todo, do, workers=workers, ranks=ranks)
        progress.close()
        partial.publish(lambda records: job.complete(folder, records), len(job.sizes))
