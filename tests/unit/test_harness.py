"""What the tests themselves rely on: forked commands, and covering arrays."""

import itertools
import os
import signal
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests import forked, gang
from tests.covering import covering
from tests.distributed.layouts import keys, layouts, num_ranks

SCRIPT = """
import atexit, os, sys
atexit.register(print, "at exit")
print(sys.argv[1:], os.getcwd(), os.environ.get("GIVEN"), __name__)
print("to stderr", file=sys.stderr)
{end}
"""


@pytest.mark.parametrize(
    ("end", "status", "printed", "errors"),
    [
        ("", 0, "at exit\n", "to stderr\n"),
        ("sys.exit(75)", 75, "at exit\n", "to stderr\n"),
        ("sys.exit('a reason')", 1, "at exit\n", "to stderr\na reason\n"),
        ("raise ValueError('wrong')", 1, "at exit\n", "ValueError: wrong\n"),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL, "", "to stderr\n"),
    ],
    ids=["end", "status", "message", "exception", "signal"],
)
def test_a_forked_command_ends_like_a_new_process(
    end: str, status: int, printed: str, errors: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(end=end))
    done = forked.run([sys.executable, script, "a", "b"], cwd=tmp_path, env={**os.environ, "GIVEN": "value"})
    assert done.returncode == status
    assert done.stdout == f"['a', 'b'] {tmp_path} value __main__\n{printed}"
    assert done.stderr.endswith(errors)


RANK_SCRIPT = """
import os, sys, time
from pathlib import Path
rank = os.environ["RANK"]
print("rank", rank, os.getppid(), flush=True)
Path(f"{rank}.printed").touch()
while not Path("0.printed").exists():
    time.sleep(0.01)
sys.exit(int(rank))
"""


def test_torchrun_reports_the_status_of_its_forked_ranks(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(RANK_SCRIPT)
    command = [sys.executable, "-m", forked.LAUNCHER, "--standalone", "--nproc-per-node", "2", script]
    process = forked.start(command, cwd=tmp_path)
    printed, errors = process.communicate()
    assert sorted(printed.splitlines()) == [f"rank {rank} {process.pid}" for rank in range(2)]
    assert "exitcode  : 1" in errors
    assert process.returncode == 1


def fails_on_the_second_rank() -> None:
    """Fail on rank 1, for which rank 0 waits."""
    if dist.get_rank() == 1:
        raise ValueError("wrong")
    dist.barrier()


def test_a_failed_rank_is_reported_while_others_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gang, "GRACE_S", 0.5)
    ranks = gang.Gang(2)
    with pytest.raises(AssertionError, match=r"(?s)rank 1:.*ValueError: wrong.*rank 0 did not answer"):
        ranks.call(fails_on_the_second_rank)
    assert not ranks.is_open
    ranks.close()


def test_a_covering_array_has_every_valid_pair() -> None:
    options = {"a": [1, 2, 3], "b": "xyz", "c": [False, True], "d": [False, True]}

    def is_valid(row: dict[str, object]) -> bool:
        return not (row["a"] == 3 and row["b"] == "z") and row["c"] != row["d"]

    product = [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]
    valid, rows = [row for row in product if is_valid(row)], covering(options, is_valid)
    assert all(row in valid for row in rows)
    assert len(rows) < len(valid)
    pairs = [{pair for row in found for pair in itertools.combinations(row.items(), 2)} for found in (rows, valid)]
    assert pairs[0] == pairs[1]


def test_layouts_fit_their_ranks() -> None:
    found = layouts(("", "tp2 sp"), ("", "pp2"), ("", "dp2"), ("", "ep2"))
    assert (1, "") in found
    assert all(num_ranks(text) == size <= 4 for size, text in found)
    assert all("dp2" in text for _, text in found if "ep2" in text), "experts need ranks"
    assert keys("tp2 sp dp2 a.b=1") == [
        "parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true", "a.b=1",
    ]  # fmt: skip
