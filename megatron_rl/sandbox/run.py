"""Run programs in the sandbox and return how they ended."""

import contextlib
import functools
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_rl.errors import RewardError

JAIL = Path(__file__).with_name("jail.py")
STARTED = b"."
"""What the jail writes just before the program starts."""
Status = Literal["passed", "failed", "timed out", "crashed"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Resource limits of a program."""

    seconds: float = 5.0
    """Wall-clock time; the limit of processor time is this rounded down, plus 2 s."""
    memory_bytes: int = 2**29
    """Address space of each process."""
    processes: int = 16
    """Processes and threads at a time, including the program itself."""
    file_bytes: int = 2**24
    """Size of all files together, and of each file."""
    output_bytes: int = 2**20
    """Standard output and standard error together."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a program ended."""

    status: Status
    """passed: it ran to its end; failed: it raised or exited early; timed out; crashed: a signal ended it."""
    message: str
    """The last line of standard error, or the limit that ended the program."""
    output: str
    """Standard output."""


@functools.cache
def isolation_error() -> str:
    """Return why programs cannot be isolated on this machine; empty if they can."""
    try:
        outcome = _run("pass", Limits(seconds=20), isolated=True)
    except RewardError as error:
        return str(error)
    return "" if outcome.status == "passed" else outcome.message or outcome.status


def run_program(program: str, limits: Limits, *, allow_unisolated: bool = False) -> Outcome:
    """Run a Python program until it ends or exceeds a limit.

    Args:
        program: source code.
        allow_unisolated: run the program even if the kernel does not allow isolation: it can then read, write and
            connect like this process, and only the limits apply.

    Raises:
        RewardError: the program cannot be isolated here and ``allow_unisolated`` is not set, or the sandbox fails.
    """
    reason = isolation_error()
    if reason and not allow_unisolated:
        raise RewardError(
            f"programs cannot be isolated on this machine ({reason}). Run as root, allow user namespaces (sysctl "
            "kernel.unprivileged_userns_clone=1, or a container with --security-opt seccomp=unconfined), or set the "
            "reward function's option allow_unisolated=true if the programs can do no harm here."
        )
    return _run(program, limits, isolated=not reason)


def _run(program: str, limits: Limits, *, isolated: bool) -> Outcome:
    token = secrets.token_hex(16)
    request = {
        "program": program,
        "token": token,
        "isolated": isolated,
        "was_root": os.getuid() == 0,
        "limits": {**asdict(limits), "cpu_s": int(limits.seconds) + 2},
    }
    with tempfile.TemporaryDirectory(prefix="sandbox_") as folder:
        os.chmod(folder, 0o777)  # the jail mounts the program's own file system here
        request["folder"] = folder
        done_read, done_write = os.pipe()
        request["done"] = done_write
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(JAIL)] if isolated else [sys.executable, "-I", "-B", str(JAIL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={},  # the program could read it
            pass_fds=(done_write,),
        )
        os.close(done_write)
        try:
            return _watch(process, json.dumps(request).encode() + b"\n", token, done_read, limits)
        finally:
            _kill_tree(process)
            os.close(done_read)


def _watch(process: "subprocess.Popen[bytes]", request: bytes, token: str, done: int, limits: Limits) -> Outcome:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    deadline = time.monotonic() + limits.seconds
    streams = {process.stdout.fileno(): "output", process.stderr.fileno(): "errors", done: "done"}
    with contextlib.suppress(BrokenPipeError):  # the process has ended; its status says why
        process.stdin.write(request)
        process.stdin.close()
    received = {name: bytearray() for name in streams.values()}
    while streams:
        seconds_left = deadline - time.monotonic()
        ready = select.select(list(streams), [], [], max(0.0, seconds_left))[0] if seconds_left > 0 else []
        if not ready:
            return _outcome("timed out", f"no end within {limits.seconds:g} s", received)
        for descriptor in ready:
            chunk = os.read(descriptor, 2**16)
            if not chunk:
                del streams[descriptor]
                continue
            received[streams[descriptor]] += chunk
        if sum(map(len, received.values())) > limits.output_bytes + len(token):
            return _outcome("failed", f"more than {limits.output_bytes} bytes of output", received)
        if not {"output", "errors"} & set(streams.values()):
            break
    try:
        status = process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return _outcome("timed out", f"no end within {limits.seconds:g} s", received)
    received["done"] += _read_available(done)
    if status == 0 and received["done"] == STARTED + token.encode():
        return _outcome("passed", "", received)
    if not received["done"].startswith(STARTED):
        reason = received["errors"].decode(errors="replace").strip()[-300:]
        raise RewardError(f"the sandbox could not be set up: {reason or f'status {status}'}")
    message = received["errors"].decode(errors="replace").strip().rsplit("\n", 1)[-1][:500]
    if status == -signal.SIGXCPU:
        return _outcome("timed out", "processor time limit exceeded", received)
    if status < 0:
        return _outcome("crashed", f"ended by {signal.Signals(-status).name}", received)
    return _outcome("failed", message or f"ended with status {status} before its end", received)


def _read_available(descriptor: int) -> bytes:
    """Read what is in a pipe without blocking."""
    os.set_blocking(descriptor, False)
    try:
        return os.read(descriptor, 2**10)
    except BlockingIOError:
        return b""


def _outcome(status: Status, message: str, received: dict[str, bytearray]) -> Outcome:
    return Outcome(status=status, message=message, output=received["output"].decode(errors="replace"))


def _kill_tree(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and all its descendants, including those that have left its session."""
    pidfds = []
    for child in _children(process.pid):
        with contextlib.suppress(OSError):  # the child has ended, or the kernel has no pidfd
            pidfds.append(os.pidfd_open(child))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)  # the first process of its namespace: the kernel ends the others
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pidfd in pidfds:
        select.select([pidfd], [], [])
        os.close(pidfd)
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def _children(pid: int) -> list[int]:
    """Return the children of a process that has one thread."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []
