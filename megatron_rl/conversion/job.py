"""A conversion from beginning to end: resume, free disk, units of work, publication."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.conversion.partial_folder import Partial, Record, check_free_disk, writing
from megatron_rl.conversion.ranks import Ranks
from megatron_rl.conversion.work import Progress, run_units


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is done; ``folder`` is always the one under construction."""

    title: str
    plan: Record
    """By which an interrupted conversion knows itself again."""
    sizes: Sequence[int]
    """Bytes of each unit of work."""
    prepare: Callable[[Path], None]
    """(folder): done on one rank before the units."""
    write: Callable[[Path, int, Progress], Record]
    """(folder, unit, progress) -> what is to be known of it later."""
    is_whole: Callable[[Path, int, Record], bool]
    """(folder, unit, record): an earlier attempt wrote it, and the disk still has it."""
    complete: Callable[[Path, list[Record]], None]
    """(folder, records of all units): done on one rank behind the units."""


def run_job(job: Job, target: Path, *, workers: int, ranks: Ranks) -> None:
    """Do it; collective over the ranks.

    Raises:
        ConversionError: on every rank, when it cannot be done; running it again goes on where it stopped.
    """
    with Partial(target, job.plan, ranks) as partial:
        folder = partial.folder
        done = {unit for unit, record in partial.done.items() if job.is_whole(folder, unit, record)}
        todo = [unit for unit in range(len(job.sizes)) if unit not in done]
        ahead = sum(job.sizes[unit] for unit in todo)

        def begin() -> None:
            if ranks.is_main:
                check_free_disk(target, ahead)
                with writing(target):
                    job.prepare(folder)

        ranks.together(begin)
        progress = Progress(job.title, sum(job.sizes), ranks)
        if ranks.is_main:
            progress.add(sum(job.sizes) - ahead)

        def do(unit: int) -> None:
            with writing(target):
                record = job.write(folder, unit, progress)
            partial.record(unit, record)

        run_units(todo, do, workers=workers, ranks=ranks)
        progress.close()
        partial.publish(lambda records: job.complete(folder, records), len(job.sizes))
