"""Inside of the sandbox: this file is a separate program that only run.py starts.

It enters new namespaces (processes, network, mounts, IPC), makes every file system read-only except a small one in
memory, becomes an unprivileged user, sets resource limits on itself, and then runs the program that it is given. When
it exits, the kernel ends all processes that the program has started.
"""

import ctypes
import json
import os
import resource
import sys
from typing import Any

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, PR_CAPBSET_DROP = 38, 1, 24
CAPABILITY_VERSION_3 = 0x20080522
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
SIGKILL = 9
FIRST_UID = 200_000
STARTED = b"."
"""Written just before the program starts: a failure before that is a failure of the sandbox."""

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Read a request from standard input and run its program."""
    request: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    if request["isolated"]:
        isolate(request["folder"])
    child = os.fork()  # the first process of the namespace; the kernel ends all others with it
    if child:
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            exit_by_signal(os.WTERMSIG(status))
        os._exit(os.WEXITSTATUS(status))
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    if request["isolated"]:
        confine(request["folder"], request["limits"]["file_bytes"], request["was_root"])
    else:
        os.chdir(request["folder"])
    limit(request["limits"], counts_processes=request["isolated"])
    program, token, done = request.pop("program"), request.pop("token"), request.pop("done")
    os.write(done, STARTED)
    run(program, token, done)


def isolate(folder: str) -> None:
    """Enter new namespaces; without root privileges, inside a new user namespace."""
    flags = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    uid, gid = os.getuid(), os.getgid()
    if uid != 0:
        check(libc.unshare(CLONE_NEWUSER), "a user namespace")
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"0 {uid} 1")
        write("/proc/self/gid_map", f"0 {gid} 1")
    check(libc.unshare(flags), "namespaces")


def confine(folder: str, size: int, was_root: bool) -> None:
    """Make everything read-only except the folder, which becomes a file system in memory, and drop all privileges."""
    check(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None), "private mounts")
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    read_only = libc.syscall(
        SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes)
    )
    check(read_only, "a read-only file system")
    options = f"size={size},mode=777".encode()
    check(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options), "a file system in memory")
    check(libc.mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV, None), "its own /proc")
    os.chdir(folder)
    if was_root:
        mount_python(os.path.join(folder, ".python"))
        # a random user of its own, as the process limit counts all processes of a user
        uid = FIRST_UID + int.from_bytes(os.urandom(3), "little")
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    drop_capabilities()
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)  # the kernel clears it when the user changes


def drop_capabilities() -> None:
    """Drop all capabilities, also those that root has inside a user namespace."""
    for number in range(64):
        libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    check(libc.capset(ctypes.byref(header), ctypes.byref(nothing)), "dropping capabilities")


def mount_python(target: str) -> None:
    """Mount Python's own modules where every user can read them: Python may be installed in root's home."""
    os.mkdir(target)
    check(libc.mount(sys.base_prefix.encode(), target.encode(), None, MS_BIND | MS_REC, None), "Python's own modules")
    sys.path = [path.replace(sys.base_prefix, target, 1) for path in sys.path]
    for package in [module for module in sys.modules.values() if "__path__" in vars(module)]:
        package.__path__ = [path.replace(sys.base_prefix, target, 1) for path in package.__path__]


def limit(limits: dict[str, int], *, counts_processes: bool) -> None:
    """Set the resource limits of the program."""
    for kind, value in (
        (resource.RLIMIT_CPU, limits["cpu_s"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        *([(resource.RLIMIT_NPROC, limits["processes"])] if counts_processes else []),
    ):
        hard = resource.getrlimit(kind)[1]
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (allowed, allowed))


def run(program: str, token: str, done: int) -> None:
    """Run the program as ``__main__`` and write the token to the ``done`` pipe only if it runs to its end."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.environ.clear()
    os.environ.update({"PATH": "/usr/bin:/bin", "HOME": os.getcwd(), "TMPDIR": os.getcwd(), "OMP_NUM_THREADS": "1"})
    sys.argv = ["program"]
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
        sys.stdout.flush()
        sys.stderr.flush()
    except SystemExit as error:
        print(f"SystemExit: {error.code}: ended before its end", file=sys.stderr, flush=True)
        os._exit(1)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}"[:1000], file=sys.stderr, flush=True)
        os._exit(1)
    os.write(done, token.encode())
    os._exit(0)


def exit_by_signal(number: int) -> None:
    """Exit by the signal that ended the program."""
    import signal

    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)


def check(result: int, what: str) -> None:
    """Print the reason and exit if a system call has failed; run.py reads the status."""
    if result != 0:
        print(f"{what}: {os.strerror(ctypes.get_errno())}", file=sys.stderr, flush=True)
        os._exit(99)


def write(path: str, text: str) -> None:
    """Write a text to a file of the kernel."""
    with open(path, "w") as file:
        file.write(text)


if __name__ == "__main__":
    main()
