"""A small Slurm cluster on this machine: python tools/cluster/local_slurm.py start DIR [--nodes 2] | stop DIR.

Starts munged, slurmctld and as many slurmd as there are nodes, all of this one host, on ports of their own, and prints
the export of SLURM_CONF by which sbatch, srun and scontrol find them. Jobs of the partition "urgent" preempt those of
the default one, which have five minutes of grace. For trying scripts, and for the tests. Needs root and the packages
slurm-wlm and munge (Debian, Ubuntu).
"""

import argparse
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo")
START_S = 300.0
STOP_S = 20.0
# {host}, {folder}, {control_port}, {nodes} and {names} are filled in
CONFIG = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=20
SlurmctldPort={control_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/pid/slurmctld
SlurmdPidFile={folder}/pid/slurmd-%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
MpiDefault=none
JobRequeue=1
KillWait=10
MessageTimeout=60
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=300
PartitionName=urgent Nodes={names} MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="A small Slurm cluster on this machine.")
    parser.add_argument("action", choices=("start", "stop"))
    parser.add_argument("folder", type=Path, help="for its configuration, state and logs")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=2, help="of each node; they may be more than there are (2)")
    parser.add_argument("--memory-mb", type=int, default=8000, help="of each node (8000)")
    parser.add_argument("--gpus", type=int, default=0, help="that each node claims to have, for sbatch --test-only (0)")
    asked = parser.parse_args(arguments)
    folder = asked.folder.resolve()
    if asked.action == "stop":
        stop(folder)
        return 0
    missing = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    if missing:
        sys.exit(f"{', '.join(missing)} not found: apt-get install -y slurm-wlm munge")
    if os.geteuid() != 0:
        sys.exit("slurmd starts jobs of other users, so the cluster needs root.")
    try:
        start(folder, asked.nodes, asked.cpus, asked.memory_mb, asked.gpus)
    except RuntimeError as error:
        stop(folder)
        sys.exit(str(error))
    print(f"export SLURM_CONF={folder}/slurm.conf")
    return 0


def start(folder: Path, num_nodes: int, cpus: int, memory_mb: int, gpus: int) -> None:
    """Start everything and wait until all nodes are idle.

    Raises:
        RuntimeError: they do not come up.
    """
    for name in ("state", "log", "pid"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    names = [f"node{number}" for number in range(1, num_nodes + 1)]
    control_port, *ports = free_ports(num_nodes + 1)
    host = socket.gethostname().split(".")[0]
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory={memory_mb}"
        + (f" Gres=gpu:{gpus}" if gpus else "")
        for name, port in zip(names, ports, strict=True)
    )
    if gpus:
        nodes = f"GresTypes=gpu\n{nodes}"
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{gpus - 1}]\n")
        for number in range(gpus):  # slurmd wants to see a file for each
            (folder / f"gpu{number}").touch()
    config = folder / "slurm.conf"
    config.write_text(
        CONFIG.format(host=host, folder=folder, control_port=control_port, nodes=nodes, names=",".join(names))
    )
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    environment = environment_of(folder)
    launch(
        folder, "munged",
        ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.sock",
         f"--pid-file={folder}/pid/munged-own", f"--log-file={folder}/log/munged.log",
         f"--seed-file={folder}/munge.seed"],
        environment,
    )  # fmt: skip
    wait_for("munged", lambda: (folder / "munge.sock").exists(), folder)
    launch(folder, "slurmctld", ["slurmctld", "-D", "-i"], environment)
    for name in names:
        launch(folder, f"slurmd-{name}", ["slurmd", "-D", "-N", name], environment)

    def all_idle() -> bool:
        told = subprocess.run(
            ["sinfo", "-h", "-N", "-p", "main", "-o", "%t"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return told.stdout.split() == ["idle"] * num_nodes

    wait_for("the nodes", all_idle, folder)


def stop(folder: Path) -> None:
    """End its jobs and processes; nothing happens where there are none."""
    if (folder / "pid").exists():
        end_jobs(environment_of(folder))
    for path in sorted((folder / "pid").glob("*.started"), reverse=True):
        pid = int(path.read_text())
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                break
            deadline = time.monotonic() + STOP_S
            while time.monotonic() < deadline and is_alive(pid):
                time.sleep(0.05)
            if not is_alive(pid):
                break
        path.unlink()


def end_jobs(environment: dict[str, str]) -> None:
    """Or their processes would be left behind."""
    command = ["timeout", str(STOP_S), "scancel", "--quiet", "--user=root"]
    if subprocess.run(command, env=environment, capture_output=True, check=False).returncode:
        return  # nobody answers
    deadline = time.monotonic() + STOP_S
    while time.monotonic() < deadline:
        left = subprocess.run(["squeue", "-h"], env=environment, capture_output=True, text=True, check=False)
        if not left.stdout.strip():
            return
        time.sleep(0.2)


def launch(folder: Path, name: str, command: list[str], environment: dict[str, str]) -> None:
    """Start a daemon in the foreground of a session of its own, and note its process id."""
    with (folder / "log" / f"{name}.out").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    (folder / "pid" / f"{name}.started").write_text(str(process.pid))


def wait_for(what: str, is_up: "object", folder: Path) -> None:
    """
    Raises:
        RuntimeError: it does not come up in time.
    """
    assert callable(is_up)
    deadline = time.monotonic() + START_S
    while not is_up():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not come up within {START_S:.0f} s. See {folder}/log.")
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    """Neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def environment_of(folder: Path) -> dict[str, str]:
    """By which daemons and commands find the cluster."""
    return {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf", "PATH": search_path()}


def search_path() -> str:
    """The daemons are in sbin, which is not on everybody's path."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


if __name__ == "__main__":
    sys.exit(main())
