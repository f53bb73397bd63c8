"""The inside of the sandbox: this file is a program of its own, started by run.py and by nothing else.

It goes into namespaces of its own (processes, network, mounts, IPC), makes every file system read-only but a small one
in memory, becomes a user without rights, takes limits upon itself, and then runs the program that it is given. When it
ends, the kernel ends everything that the program has started.
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
BEGUN = b"."
"""Said just before the program begins: what fails earlier is the sandbox's failure."""

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Read what to do from standard input, and do it."""
    order: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    if order["isolated"]:
        isolate(order["folder"])
    child = os.fork()  # the first process of the namespace; all others end with it
    if child:
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            end_by(os.WTERMSIG(status))
        os._exit(os.WEXITSTATUS(status))
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    if order["isolated"]:
        close_in(order["folder"], order["limits"]["file_bytes"], order["was_root"])
    else:
        os.chdir(order["folder"])
    limit(order["limits"], counts_processes=order["isolated"])
    program, word, done = order.pop("program"), order.pop("word"), order.pop("done")
    os.write(done, BEGUN)
    run(program, word, done)


def isolate(folder: str) -> None:
    """New namespaces; without root's rights by way of a user namespace."""
    flags = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    uid, gid = os.getuid(), os.getgid()
    if uid != 0:
        check(libc.unshare(CLONE_NEWUSER), "a user namespace")
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"0 {uid} 1")
        write("/proc/self/gid_map", f"0 {gid} 1")
    check(libc.unshare(flags), "namespaces")


def close_in(folder: str, size: int, was_root: bool) -> None:
    """Nothing can be written but in the folder, which is a file system in memory."""
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
        show_python(os.path.join(folder, ".python"))
        # one of its own, so that processes are counted for this program alone
        uid = FIRST_UID + int.from_bytes(os.urandom(3), "little")
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    drop_rights()
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)  # forgotten when the user changes


def drop_rights() -> None:
    """No capabilities, also in a user namespace, where root's name would still have them."""
    for number in range(64):
        libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    check(libc.capset(ctypes.byref(header), ctypes.byref(nothing)), "giving up capabilities")


def show_python(place: str) -> None:
    """Python's own modules in a place where everybody can read them: it may be installed in root's home."""
    os.mkdir(place)
    check(libc.mount(sys.base_prefix.encode(), place.encode(), None, MS_BIND | MS_REC, None), "Python's own modules")
    sys.path = [path.replace(sys.base_prefix, place, 1) for path in sys.path]
    for package in [module for module in sys.modules.values() if "__path__" in vars(module)]:
        package.__path__ = [path.replace(sys.base_prefix, place, 1) for path in package.__path__]


def limit(limits: dict[str, int], *, counts_processes: bool) -> None:
    """What the program may use."""
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


def run(program: str, word: str, done: int) -> None:
    """Run it as a main program; the word is written to a pipe only when it comes to its end."""
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
    os.write(done, word.encode())
    os._exit(0)


def end_by(number: int) -> None:
    """End as the program has ended."""
    import signal

    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)


def check(result: int, what: str) -> None:
    """End with the reason when the kernel refuses; run.py reads the status."""
    if result != 0:
        print(f"{what}: {os.strerror(ctypes.get_errno())}", file=sys.stderr, flush=True)
        os._exit(99)


def write(path: str, text: str) -> None:
    """All of a text into a file of the kernel's."""
    with open(path, "w") as file:
        file.write(text)


if __name__ == "__main__":
    main()
