"""A folder under construction: filled under another name, resumed when interrupted, renamed when complete."""

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


class Partial:
    """``TARGET.partial`` with a journal of the units of work that are done.

    A unit is recorded after its bytes are written; the journal is no part of the result.
    """

    def __init__(self, target: Path, plan: Record, ranks: Ranks) -> None:
        """Begin, or go on with what an interrupted conversion with the same plan has left; collective.

        Raises:
            ConversionError: the target is not empty, another conversion is writing it, or what is left belongs
                to a different one.
        """
        self.target = target
        self.folder = target.with_name(target.name + ".partial")
        self._journal = self.folder / JOURNAL
        self._ranks = ranks
        self._append = threading.Lock()
        self._lock: int | None = None
        ranks.together(lambda: self._begin(plan) if ranks.is_main else None)
        self.done = self._read_journal()
        ranks.together(lambda: None)  # everyone has read before anyone writes
        self._own = os.open(self._journal / f"{ranks.rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def record(self, unit: int, record: Record) -> None:
        """A unit is done."""
        line = f"\n{json.dumps({'unit': unit, **record})}".encode()
        with writing(self.target), self._append:
            if os.write(self._own, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __enter__(self) -> "Partial":
        return self

    def __exit__(self, *_: object) -> None:
        """Let others have it; what is written stays."""
        os.close(self._own)
        if self._lock is not None:
            os.close(self._lock)

    def publish(self, complete: Callable[[list[Record]], None], num_units: int) -> None:
        """Give the folder its name; collective.

        Args:
            complete: called on the main rank with the records of all units in order, to write what belongs to
                all of them.

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
                self.target.rmdir()  # empty, or it would have been refused
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
            known = self._journal / "plan.json"
            wanted = json.dumps(plan, sort_keys=True)
            if known.exists() and known.read_text() != wanted:
                raise ConversionError(
                    f"{self.folder} is left of an interrupted conversion of another input or with other options. "
                    "Repeat that one, or remove the folder."
                )
            temporary = known.with_suffix(".new")
            temporary.write_text(wanted)
            os.replace(temporary, known)

    def _read_journal(self) -> dict[int, Record]:
        found = {}
        for path in self._journal.glob("*.jsonl"):
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # cut off by the interruption, or the empty line before each record
                    continue
                found[record["unit"]] = record
        return found


class writing:  # noqa: N801  a context manager
    """Turn an OSError of the body into a ConversionError that names the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError) and not isinstance(error, ConversionError):
            raise ConversionError(
                f"cannot write {self._folder}: {error}. Free space or choose another folder, then run the same "
                "command again: it goes on where it stopped."
            ) from error


def check_free_disk(folder: Path, needed: int) -> None:
    """Refuse to begin what cannot be completed.

    Raises:
        ConversionError: the disk has less space than that.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConversionError(
            f"{folder} needs {needed / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB free. "
            "Free space or choose another folder."
        )
