"""Hostile programs do no harm, and each gets the expected status."""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from megatron_rl.errors import RewardError
from megatron_rl.rewards.code import code_tests, fenced
from megatron_rl.rewards.types import RewardInput
from megatron_rl.sandbox import Limits, isolation_error, run, run_program

LIMITS = Limits(seconds=60)
SHORT_LIMITS = Limits(seconds=5)

# name -> program, status, part of the message
PROGRAMS = {
    "ends": ("assert 1 + 1 == 2", "passed", ""),
    "uses the library": ("import json, math, socket, collections; assert math.isqrt(9) == 3", "passed", ""),
    "writes a file of its own": ("open('a', 'w').write('x'); assert open('a').read() == 'x'", "passed", ""),
    "leaves a daemon": ("import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)", "passed", ""),
    "is wrong": ("assert 1 + 1 == 3, 'no'", "failed", "AssertionError: no"),
    "is no program": ("def f(:", "failed", "SyntaxError"),
    "leaves early": ("import sys; sys.exit(0)", "failed", "ended before its end"),
    "leaves early, harder": ("import os; os._exit(0)", "failed", "before its end"),
    "never ends": ("while True: pass", "timed out", "no end within"),
    "leaves its session": ("import os, time; os.setsid(); time.sleep(1000)", "timed out", "no end within"),
    "sleeps": ("import time; time.sleep(1000)", "timed out", "no end within"),
    "ignores signals": (
        "import signal\nfor n in (2, 10, 12, 15): signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "timed out",
        "",
    ),
    "forks without end": ("import os\nwhile True: os.fork()", "failed", "temporarily unavailable"),
    "starts threads without end": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()",
        "failed",
        "can't start new thread",
    ),
    "prints without end": ("while True: print('x' * 1000)", "failed", "bytes of output"),
    "calls itself": ("def f(): return f()\nf()", "failed", "RecursionError"),
    "takes all memory": ("x = bytearray(10**11)", "failed", "MemoryError"),
    "writes without end": ("open('a', 'w').write('x' * 10**8)", "failed", "File too large"),
    "fills its disk": (
        "for i in range(99): open(str(i), 'w').write('x' * 10**6)",
        "failed",
        "No space left",
    ),
    "crashes": ("import ctypes; ctypes.string_at(0)", "crashed", "SIGSEGV"),
    "removes a file": ("import os; os.remove('/etc/hostname')", "failed", "Read-only file system"),
    "removes everything": ("import shutil; shutil.rmtree('/', ignore_errors=False)", "failed", ""),
    "writes elsewhere": ("open('/tmp/evil', 'w')", "failed", "Read-only file system"),
    "mounts": (
        "import ctypes, os; l = ctypes.CDLL(None, use_errno=True)\n"
        "assert l.mount(None, b'/', None, 32 | 4096, None) == 0, os.strerror(ctypes.get_errno())",
        "failed",
        "Operation not permitted",
    ),
    "connects": ("import socket; socket.create_connection(('127.0.0.1', PORT), 2)", "failed", "unreachable"),
    "kills others": ("import os; os.kill(-1, 9)", "failed", ""),
    "reads the keyboard": ("input()", "failed", "EOFError"),
    "reads the environment": ("import os; assert 'SECRET' in os.environ", "failed", "AssertionError"),
}


def test_this_machine_can_isolate_programs() -> None:
    assert isolation_error() == ""


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_program_gets_its_expected_status(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setenv("SECRET", "x")
    before = set(os.listdir("/"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        text, status, message = PROGRAMS[name]
        limits = SHORT_LIMITS if status == "timed out" else LIMITS
        outcome = run_program(text.replace("PORT", str(listening.getsockname()[1])), limits)
    assert (outcome.status, message in outcome.message) == (status, True), outcome
    assert set(os.listdir("/")) == before
    assert not Path("/tmp/evil").exists()
    assert not any(str(run.JAIL) in line for line in command_lines())


def command_lines() -> list[str]:
    """Return the command lines of all processes."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_text())
        except OSError:
            continue
    return lines


def test_a_program_runs_without_privileges() -> None:
    text = "import os; print(os.getuid(), len([p for p in os.listdir('/proc') if p.isdigit()]), os.listdir('.'))"
    uid, processes, *files = run_program(text, LIMITS).output.split()
    assert int(uid) > 0
    assert int(processes) <= 2
    assert files == ["['.python']"] if os.getuid() == 0 else ["[]"]


def test_programs_run_concurrently() -> None:
    outcomes: list[str] = []

    def one(number: int) -> None:
        text = f"import os, time\nopen('a', 'w').write('{number}')\ntime.sleep(0.5)\nprint(open('a').read())"
        outcomes.append(run_program(text, Limits(seconds=30)).output.strip())

    threads = [threading.Thread(target=one, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == list("012345")


def test_programs_are_rejected_where_they_cannot_be_isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "isolation_error", lambda: "namespaces: Operation not permitted")
    with pytest.raises(RewardError, match=r"\(namespaces: Operation not permitted\).*allow_unisolated=true"):
        run_program("pass", LIMITS)
    assert run_program("assert True", LIMITS, allow_unisolated=True).status == "passed"
    assert run_program("while True: pass", Limits(seconds=1), allow_unisolated=True).status == "timed out"
    assert run_program("import os; os._exit(0)", LIMITS, allow_unisolated=True).status == "failed"


def problem(response: str, **columns: object) -> RewardInput:
    return RewardInput(
        prompt="", response=response, answer=None, finish_reason="stop", num_tokens=1, seed=0, metadata=columns
    )


def test_code_is_the_last_fenced_block_with_the_definition() -> None:
    assert fenced("a\n```python\nx = 1\n```\nb\n```\ny = 2\n```", "def ") == "y = 2"
    assert fenced("```python3\ndef f(): 1\n```\nUsage:\n```python\nf()\n```", "def f(") == "def f(): 1"
    assert fenced("```bash\npip\n```\n```py\nx = 1\n", "def ") == "x = 1\n"
    assert fenced("```bash\npip\n```\nThis works.", "def ") is None
    assert fenced("x = 1", "def ") is None


def test_imports_and_helpers_of_the_prompt_are_kept() -> None:
    prompt = (
        'from typing import List\n\ndef helper(x):\n    return x + 1\n\n\ndef f(x: List[int]) -> int:\n    """?"""\n'
    )
    columns = {"prompt": prompt, "entry_point": "f", "test": "def check(f):\n    assert f([helper(1)]) == 2"}
    assert code_tests(problem("```python\ndef f(x: List[int]) -> int:\n    return x[0]\n```", **columns)) == 1
    assert code_tests(problem("    return x[0]", **columns)) == 1
    assert code_tests(problem("    return x", **columns)) == 0


def test_a_limit_above_that_of_the_worker_is_lowered_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert hard >= 64
    text = "import resource; print(resource.getrlimit(resource.RLIMIT_AS)[1])"
    code = (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))\n"
        "from megatron_rl.sandbox import Limits, run_program\n"
        f"print(run_program({text!r}, Limits(seconds=20, memory_bytes=2**33)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "status='passed'" in done.stdout
    assert str(2**31) in done.stdout


def test_a_sandbox_that_cannot_be_set_up_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "jail.py"
    broken.write_text("import sys; sys.stdin.readline(); sys.exit('namespaces: no')")
    monkeypatch.setattr(run, "JAIL", broken)
    with pytest.raises(RewardError, match="the sandbox could not be set up: namespaces: no"):
        run_program("pass", LIMITS)


def test_isolation_holds_without_root() -> None:
    """Run as another user in a user namespace, where a program with its capabilities could undo the mounts."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        shutil.copy(run.JAIL, folder / "jail.py")
        (folder / "kept").write_text("x")
        (folder / "work").mkdir()
        for path in (folder, *folder.iterdir()):
            path.chmod(0o777)
        order = {
            "token": "w", "isolated": True, "was_root": False, "folder": str(folder / "work"), "done": 1,
            "limits": {"cpu_s": 9, "memory_bytes": 2**30, "processes": 16, "file_bytes": 2**20},
            "program": "import ctypes\nl = ctypes.CDLL(None, use_errno=True)\n"
            "assert l.mount(None, b'/', None, 32 | 4096, None) != 0\n"
            "assert int(open('/proc/self/status').read().split('CapEff:')[1].split()[0], 16) == 0\n"
            f"try:\n    open({str(folder / 'kept')!r}, 'w')\n    raise ValueError\nexcept OSError:\n    pass",
        }  # fmt: skip
        readable = Path("/usr/bin/python3")  # the Python of the tests may be in root's home
        done = subprocess.run(
            [str(readable) if readable.exists() else sys.executable, "-I", "-S", str(folder / "jail.py")],
            input=json.dumps(order) + "\n", capture_output=True, text=True, check=False, cwd="/",
            user=12345 if os.getuid() == 0 else None,
        )  # fmt: skip
        assert (done.stdout, done.returncode) == (".w", 0), done.stderr
        assert (folder / "kept").read_text() == "x"
