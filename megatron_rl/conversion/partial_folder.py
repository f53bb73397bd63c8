"""A folder that is written under a temporary name, resumed after an interruption and renamed when complete."""

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rl.conversion.ranks import Ranks
from megatron_rl.errors import ConversionError

JOURNAL = "journal"
Record = dict[str, Any]


class PartialFolder:
    """``TARGET.partial`` with a journal of the completed units of work.

    A unit is recorded after its bytes are written; the journal is not part of the result.
    """

    def __init__(self, target: Path, plan: Record, ranks: Ranks) -> None:
        """Create the folder, or resume an interrupted conversion with the same plan; collective.

        Args:
            target: folder to create.
            plan: input and options of the conversion.

        Raises:
            ConversionError: the target is not empty, another conversion is writing it, or the existing partial folder
                has a different plan.
        """
        self.target = target
        self.folder = target.with_name(target.name + ".partial")
        self._journal = self.folder / JOURNAL
        self._ranks = ranks
        self._append = threading.Lock()
        self._lock: int | None = None
        ranks.together(lambda: self._begin(plan) if ranks.is_main else None)
        self.done = self._read_journal()
        ranks.together(lambda: None)  # a barrier: all ranks read the journal before any rank writes to it
        self._own_journal = os.open(self._journal / f"{ranks.rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def record(self, unit: int, record: Record) -> None:
        """Record a completed unit in the journal."""
        line = f"\n{json.dumps({'unit': unit, **record})}".encode()
        with writing(self.target), self._append:
            if os.write(self._own_journal, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __enter__(self) -> "PartialFolder":
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock; the files stay."""
        os.close(self._own_journal)
        if self._lock is not None:
            os.close(self._lock)

    def publish(self, complete: Callable[[list[Record]], None], num_units: int) -> None:
        """Complete the folder and rename it to its final name; collective.

        Args:
            complete: called on the main rank with the records of all units in order, to write the remaining files.
            num_units: expected number of units.

        Raises:
            ConversionError: a unit is missing, or the folder cannot be written.
        """
        self._ranks.together(lambda: None)
        self._ranks.together(lambda: self._publish(complete, num_units) if self._ranks.is_main else None)

    def _publish(self, complete: Callable[[list[Record]], None], num_units: int) -> None:
        records = self._read_journal()
        missing = sorted(set(range(num_units)) - set(records))
        if missing:
            raise ConversionError(f"{self.folder}: {len(missing)} parts were not converted. Run it again.")
        with writing(self.target):
            complete([records[unit] for unit in range(num_units)])
            shutil.rmtree(self._journal)
            if self.target.exists():
                self.target.rmdir()  # it is empty, as _begin checked
            os.replace(self.folder, self.target)

    def _begin(self, plan: Record) -> None:
        with writing(self.target):
            if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
                raise ConversionError(f"{self.target} exists and is not empty. Choose another folder or remove it.")
            self._journal.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._journal / "lock", os.O_WRONLY | os.O_CREAT)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(lock)
                raise ConversionError(f"{self.folder} is being written by another conversion. Wait for it.") from error
            self._lock = lock
            plan_file = self._journal / "plan.json"
            content = json.dumps(plan, sort_keys=True)
            if plan_file.exists() and plan_file.read_text() != content:
                raise ConversionError(
                    f"{self.folder} is left from an interrupted conversion of another input or with other options. "
                    "Run that conversion again, or remove the folder."
                )
            temporary = plan_file.with_suffix(".new")
            temporary.write_text(content)
            os.replace(temporary, plan_file)

    def _read_journal(self) -> dict[int, Record]:
        """Records of the completed units of all ranks, by unit."""
        records = {}
        for path in self._journal.glob("*.jsonl"):
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # truncated by the interruption, or the empty line before each record
                    continue
                records[record["unit"]] = record
        return records


class writing:  # noqa: N801  a context manager
    """Convert an OSError of the body to a ConversionError that names the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError) and not isinstance(error, ConversionError):
            raise ConversionError(
                f"cannot write {self._folder}: {error}. Free disk space or choose another folder, then run the same "
                "command again to resume."
            ) from error


def check_free_disk(folder: Path, needed: int) -> None:
    """Check that the disk of a folder has enough free space.

    Args:
        needed: required bytes.

    Raises:
        ConversionError: less space is free.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConversionError(
            f"{folder} needs {needed / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB free. "
            "Free disk space or choose another folder."
        )
