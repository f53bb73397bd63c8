"""Python commands in processes that are forked from a server with torch, transformers and Megatron-Core imported.

Importing them takes five seconds of CPU in every process, more than most tests need. The forked process gets the
command's arguments, environment, working directory and standard streams, is signalled and killed as any other, and
exits with the status of the command. ``torchrun`` is the real elastic agent, whose ranks are forked from it. Tests of
what a new interpreter does (imports, start under a launcher) use ``subprocess``.
"""

import atexit
import functools
import importlib
import inspect
import multiprocessing
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, NoReturn

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from tests.limits import LIMIT_S

IMPORTS = (
    *("transformers", "safetensors.torch", "megatron_rl.mcore", "megatron_rl.trainer.setup"),
    *("megatron_rl.trainer.dry_run", "megatron_rl.trainer.reward_model_trainer", "megatron_rl.evaluation.run"),
    *("megatron_rl.conversion.to_hf", "megatron_rl.conversion.to_megatron", "megatron_rl.reporting.run_report"),
    *("megatron_rl.rollout.engines.embedded", "tests.gang"),
)
ROOT = Path(__file__).parents[1]
LAUNCHER = "torch.distributed.run"
ARGUMENTS = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]
PIPE_ENDS = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")


class Forked:
    """A running process; the attributes and methods are those of ``subprocess.Popen`` in text mode."""

    def __init__(self, pid: int, status: Connection, *output: IO[bytes]) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status
        self._output = output

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while the process runs."""
        return self._wait(0)

    def wait(self, timeout: float = LIMIT_S) -> int:
        """Return the exit status once the process has ended.

        Raises:
            subprocess.TimeoutExpired: it has not ended after ``timeout`` seconds.
        """
        status = self._wait(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return status

    def communicate(self, timeout: float = LIMIT_S) -> tuple[str, str]:
        """Wait as ``wait`` does, and return what the process printed to stdout and to stderr."""
        self.wait(timeout)
        printed, errors = map(_content, self._output)
        return printed, errors

    def end(self, grace_s: float = 0.0) -> None:
        """Kill the process unless it ends within ``grace_s`` seconds."""
        if self._wait(grace_s) is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def _wait(self, seconds: float) -> int | None:
        if self.returncode is None and self._status.poll(seconds):
            self.returncode = self._status.recv()
        return self.returncode


def start(
    command: Sequence[object],
    *,
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
    merge: bool = False,
    new_session: bool = False,
) -> Forked:
    """Start ``[sys.executable, "-m", module, …]`` or ``[sys.executable, script, …]``.

    Args:
        merge: send stderr to stdout.
        new_session: make the process the leader of a session and process group of its own.
    """
    interpreter, *arguments = map(str, command)
    assert interpreter == sys.executable
    stdout, stderr = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
    streams = [stdout.fileno(), stdout.fileno() if merge else stderr.fileno()]
    options = {"cwd": str(cwd), "env": env or dict(os.environ), "new_session": new_session}
    pid, status = server().fork(_run_as_main, (arguments, options), streams)
    return Forked(pid, status, stdout, stderr)


def call(function: Callable[..., object], *arguments: object, fds: Sequence[int] = ()) -> Forked:
    """Call ``function(*arguments, *fds)`` in a forked process, which gets duplicates of the file descriptors.

    It prints where this process does.
    """
    return Forked(*server().fork(function, arguments, fds))


def run(command: Sequence[object], **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run a command as ``start`` does, and return its exit status and output."""
    process = start(command, **options)
    printed, errors = process.communicate()
    return subprocess.CompletedProcess(list(command), process.wait(), printed, errors)


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


class ForkServer:
    """A process with all imports, which forks itself on request and reports the exit status of each child."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._requests = Connection(os.dup(self._socket.fileno()))
        command = [sys.executable, "-m", "tests.forked", str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT)
        theirs.close()
        self._requests.send_bytes(bytes(multiprocessing.current_process().authkey))  # to exchange tensors
        assert self._requests.recv() == "ready"

    def fork(
        self, function: Callable[..., object], arguments: tuple[Any, ...], fds: Sequence[int]
    ) -> tuple[int, Connection]:
        """Call ``function(*arguments, *fds)`` in a new process.

        Returns:
            Its process id, and a connection that receives its exit status when it has ended.
        """
        status, child_end = socket.socketpair()
        self._requests.send((function, arguments))
        socket.send_fds(self._socket, [b"."], [child_end.fileno(), *fds])
        child_end.close()
        return self._requests.recv(), Connection(status.detach())


@functools.cache
def server() -> ForkServer:
    """Return the server of this process; it ends when this process does."""
    return ForkServer()


def _serve(requests: socket.socket) -> None:
    """Fork for each request until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for module in IMPORTS:
        importlib.import_module(module)
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    connection, statuses = Connection(os.dup(requests.fileno())), dict[int, Connection]()
    multiprocessing.current_process().authkey = connection.recv_bytes()
    connection.send("ready")
    selector = selectors.DefaultSelector()
    for readable in (requests, woken):
        selector.register(readable, selectors.EVENT_READ)
    while True:
        ready = {key.fileobj for key, _ in selector.select()}
        if woken in ready:
            woken.recv(4096)
            _report(statuses)
        if requests in ready:
            try:
                function, arguments = connection.recv()
            except EOFError:
                return
            _, (status, *fds), _, _ = socket.recv_fds(requests, 1, 8)
            pid = os.fork()
            if pid == 0:
                for end in (requests, woken, wake):
                    end.close()
                connection.close()
                _end(function, arguments, fds)
            statuses[pid] = Connection(status)
            for fd in fds:
                os.close(fd)
            connection.send(pid)


def _report(statuses: dict[int, Connection]) -> None:
    """Send the exit status of every child that has ended."""
    for pid in list(statuses):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with suppress(BrokenPipeError):  # the test may not wait for it
                statuses[pid].send(os.waitstatus_to_exitcode(status))
            statuses.pop(pid).close()


def _end(function: Callable[..., object], arguments: tuple[Any, ...], fds: list[int]) -> NoReturn:
    """Call the function in a forked process, and end it as the interpreter would."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 1
    try:
        function(*arguments, *fds)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status & 0xFF)


def _run_as_main(arguments: list[str], options: dict[str, Any], stdout: int, stderr: int) -> None:
    """Run what ``python arguments…`` would, with the file descriptors as stdout and stderr."""
    if options["new_session"]:
        os.setsid()
    for fd, target in ((stdout, 1), (stderr, 2)):
        os.dup2(fd, target)
        os.close(fd)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
    os.chdir(options["cwd"])
    os.environ.clear()
    os.environ.update(options["env"])
    subprocess.Popen = subprocess_handler.Popen = _ForkingPopen
    if arguments[0] == "-u":
        arguments = arguments[1:]
    if arguments[0] == "-m":
        module, sys.argv = arguments[1], arguments[1:]
        sys.path[0] = os.getcwd()
        if module == LAUNCHER:
            torchrun.main(sys.argv[1:])
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")


class _ForkingPopen(subprocess.Popen[Any]):
    """Starts Python modules, scripts and torchrun by forking this process, which has the imports; others as usual."""

    def _execute_child(self, args: Any, *others: Any) -> None:
        given = ARGUMENTS.bind(self, args, *others).arguments
        program, *arguments = [args] if isinstance(args, str) else map(str, args)
        if Path(program).name == "torchrun":
            arguments = ["-m", LAUNCHER, *arguments]
        elif program not in (sys.executable, "python") or not (
            arguments[0] in ("-m", "-u") or arguments[0].endswith(".py")
        ):
            super()._execute_child(args, *others)  # type: ignore[misc]
            return
        self.pid = os.fork()
        if self.pid == 0:
            fds = [os.dup(1 if given["c2pwrite"] == -1 else given["c2pwrite"])]
            fds.append(os.dup(2 if given["errwrite"] == -1 else given["errwrite"]))
            options = {
                "cwd": str(given["cwd"] or Path.cwd()),
                "env": dict(os.environ if given["env"] is None else given["env"]),
                "new_session": given["start_new_session"],
            }
            _end(_run_as_main, (arguments, options), fds)
        self._child_created = True
        self._close_pipe_fds(*(given[name] for name in PIPE_ENDS))  # type: ignore[attr-defined]


if __name__ == "__main__":
    from tests import forked  # under the name that requests are pickled with

    forked._serve(socket.socket(fileno=int(sys.argv[1])))
