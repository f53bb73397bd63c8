"""Digests of the files of a checkpoint."""

from pathlib import Path

import pytest

from megatron_rl.checkpointing.integrity import DIGESTS, digest_files, verify_files, write_digests
from megatron_rl.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "policy").mkdir()
    for name in ("policy/a", "policy/b", "trainer.json"):
        (tmp_path / name).write_text(name * 3)
    write_digests(tmp_path, digest_files(tmp_path, ["policy/a", "policy/b", "trainer.json"]))
    return tmp_path


def check(folder: Path, *, hashes: bool = True) -> None:
    for share in range(2):
        verify_files(folder, share=share, shares=2, hashes=hashes)


def test_an_untouched_folder_passes(folder: Path) -> None:
    check(folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "policy/b").unlink()
    with pytest.raises(CheckpointError, match=r"policy/b: expected 24 bytes, it is missing"):
        check(folder, hashes=False)


def test_a_file_that_was_cut_short_is_named(folder: Path) -> None:
    (folder / "policy/a").write_text("x")
    with pytest.raises(CheckpointError, match=r"policy/a: expected 24 bytes, it has 1"):
        check(folder, hashes=False)


@pytest.mark.parametrize("name", ["policy/a", "policy/b", "trainer.json"])
def test_a_changed_byte_is_found(name: str, folder: Path) -> None:
    (folder / name).write_text((folder / name).read_text().swapcase())
    with pytest.raises(CheckpointError, match=f"{name}: its content has changed"):
        check(folder)


@pytest.mark.parametrize("damage", [None, "{"])
def test_a_folder_without_readable_digests_is_incomplete(damage: str | None, folder: Path) -> None:
    (folder / DIGESTS).unlink()
    if damage:
        (folder / DIGESTS).write_text(damage)
    with pytest.raises(CheckpointError, match="incomplete"):
        check(folder)
