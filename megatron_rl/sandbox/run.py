"""Start programs in the sandbox, watch them, and say how they ended."""

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
BEGUN = b"."
"""What the jail says just before the program begins."""
Status = Literal["passed", "failed", "timed out", "crashed"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use."""

    seconds: float = 5.0
    """Of wall-clock time; and of processor time, rounded up and one more."""
    memory_bytes: int = 2**29
    """Address space of each of its processes."""
    processes: int = 16
    """At a time, itself and threads counted in."""
    file_bytes: int = 2**24
    """All of its files together, and each of them."""
    output_bytes: int = 2**20
    """Of standard output and error."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a program ended."""

    status: Status
    """passed: it came to its end; failed: it raised, or left early; timed out; crashed: ended by a signal."""
    message: str
    """The end of what it said on standard error, or the limit that ended it."""
    output: str
    """Standard output."""


@functools.cache
def isolation() -> str:
    """Why programs cannot be shut in on this machine; empty when they can."""
    try:
        outcome = _started("pass", Limits(seconds=20), isolated=True)
    except RewardError as error:
        return str(error)
    return "" if outcome.status == "passed" else outcome.message or outcome.status


def run_program(program: str, limits: Limits, *, allow_unisolated: bool = False) -> Outcome:
    """Run a Python program to its end, or to that of a limit.

    Args:
        allow_unisolated: run it also where the kernel lets nobody shut it in: it can then read, write and connect as
            this process can, and only the limits hold.

    Raises:
        RewardError: it cannot be shut in here, and nobody allowed that.
    """
    reason = isolation()
    if reason and not allow_unisolated:
        raise RewardError(
            f"programs cannot be shut in on this machine ({reason}). Run as root, allow user namespaces (sysctl "
            "kernel.unprivileged_userns_clone=1, or a container with --security-opt seccomp=unconfined), or set the "
            "scorer's option allow_unisolated=true where nothing can be harmed."
        )
    return _started(program, limits, isolated=not reason)


def _started(program: str, limits: Limits, *, isolated: bool) -> Outcome:
    word = secrets.token_hex(16)
    order = {
        "program": program,
        "word": word,
        "isolated": isolated,
        "was_root": os.getuid() == 0,
        "limits": {**asdict(limits), "cpu_s": int(limits.seconds) + 2},
    }
    with tempfile.TemporaryDirectory(prefix="sandbox_") as folder:
        os.chmod(folder, 0o777)  # a file system of the program's own is put in its place
        order["folder"] = folder
        done_read, done_write = os.pipe()
        order["done"] = done_write
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(JAIL)] if isolated else [sys.executable, "-I", "-B", str(JAIL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={},  # which the program could find
            pass_fds=(done_write,),
        )
        os.close(done_write)
        try:
            return _watched(process, json.dumps(order).encode() + b"\n", word, done_read, limits)
        finally:
            _end(process)
            os.close(done_read)


def _watched(process: "subprocess.Popen[bytes]", order: bytes, word: str, done: int, limits: Limits) -> Outcome:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    deadline = time.monotonic() + limits.seconds
    streams = {process.stdout.fileno(): "output", process.stderr.fileno(): "errors", done: "done"}
    with contextlib.suppress(BrokenPipeError):  # it has ended; its status says why
        process.stdin.write(order)
        process.stdin.close()
    said = {name: bytearray() for name in streams.values()}
    while streams:
        left = deadline - time.monotonic()
        ready = select.select(list(streams), [], [], max(0.0, left))[0] if left > 0 else []
        if not ready:
            return _outcome("timed out", f"no end within {limits.seconds:g} s", said)
        for descriptor in ready:
            chunk = os.read(descriptor, 2**16)
            if not chunk:
                del streams[descriptor]
                continue
            said[streams[descriptor]] += chunk
        if sum(map(len, said.values())) > limits.output_bytes + len(word):
            return _outcome("failed", f"more than {limits.output_bytes} bytes of output", said)
        if not {"output", "errors"} & set(streams.values()):
            break
    try:
        status = process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return _outcome("timed out", f"no end within {limits.seconds:g} s", said)
    said["done"] += _rest(done)
    if status == 0 and said["done"] == BEGUN + word.encode():
        return _outcome("passed", "", said)
    if not said["done"].startswith(BEGUN):
        reason = said["errors"].decode(errors="replace").strip()[-300:]
        raise RewardError(f"the sandbox did not close: {reason or f'status {status}'}")
    message = said["errors"].decode(errors="replace").strip().rsplit("\n", 1)[-1][:500]
    if status == -signal.SIGXCPU:
        return _outcome("timed out", "its processor time is used up", said)
    if status < 0:
        return _outcome("crashed", f"ended by {signal.Signals(-status).name}", said)
    return _outcome("failed", message or f"ended with status {status} before its end", said)


def _rest(descriptor: int) -> bytes:
    """What is in a pipe without waiting."""
    os.set_blocking(descriptor, False)
    try:
        return os.read(descriptor, 2**10)
    except BlockingIOError:
        return b""


def _outcome(status: Status, message: str, said: dict[str, bytearray]) -> Outcome:
    return Outcome(status=status, message=message, output=said["output"].decode(errors="replace"))


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End it and all that it has started, also a program that has left its session."""
    ends = []
    for child in _children(process.pid):
        with contextlib.suppress(OSError):  # it has ended, or the kernel does not know of these
            ends.append(os.pidfd_open(child))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)  # the first of its namespace: the kernel ends the others
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for end in ends:
        select.select([end], [], [])
        os.close(end)
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def _children(pid: int) -> list[int]:
    """Of a process that has one thread."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []
