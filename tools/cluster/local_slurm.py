"""Run a small Slurm cluster on this machine: python tools/cluster/local_slurm.py start DIR [--nodes 2] | stop DIR.

Starts munged, slurmctld and one slurmd per node, all on this host and on free ports, and prints the export of
SLURM_CONF by which sbatch, srun and scontrol find the cluster. Jobs of the partition "urgent" preempt those of the
default partition, which have five minutes of grace. It serves for trying scripts, and for the tests. Needs root and the
packages slurm-wlm and munge (Debian, Ubuntu).
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
# template of slurm.conf
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


def main(argv: list[str] | None = None) -> int:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Run a small Slurm cluster on this machine.")
    parser.add_argument("action", choices=("start", "stop"))
    parser.add_argument("folder", type=Path, help="folder for configuration, state and logs")
    parser.add_argument("--nodes", type=int, default=2, help="number of nodes (2)")
    parser.add_argument(
        "--cpus", type=int, default=2, help="CPUs of each node, which may exceed those of this machine (2)"
    )
    parser.add_argument("--memory-mb", type=int, default=8000, help="memory of each node (8000)")
    parser.add_argument(
        "--gpus", type=int, default=0, help="GPUs that each node claims to have, for sbatch --test-only (0)"
    )
    args = parser.parse_args(argv)
    folder = args.folder.resolve()
    if args.action == "stop":
        stop(folder)
        return 0
    missing = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    if missing:
        sys.exit(f"{', '.join(missing)} not found: apt-get install -y slurm-wlm munge")
    if os.geteuid() != 0:
        sys.exit("the cluster needs root, because slurmd starts jobs as other users.")
    try:
        start(folder, args.nodes, args.cpus, args.memory_mb, args.gpus)
    except RuntimeError as error:
        stop(folder)
        sys.exit(str(error))
    print(f"export SLURM_CONF={folder}/slurm.conf")
    return 0


def start(folder: Path, num_nodes: int, cpus: int, memory_mb: int, gpus: int) -> None:
    """Start all daemons and wait until all nodes are idle.

    Raises:
        RuntimeError: a daemon or node does not come up in time.
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
        for number in range(gpus):  # slurmd checks that each device file exists
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
        listed = subprocess.run(
            ["sinfo", "-h", "-N", "-p", "main", "-o", "%t"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return listed.stdout.split() == ["idle"] * num_nodes

    wait_for("the nodes", all_idle, folder)


def stop(folder: Path) -> None:
    """Cancel the cluster's jobs and end its processes, if there are any."""
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
    """Cancel all jobs and wait until they are gone; otherwise their processes would outlive the cluster."""
    command = ["timeout", str(STOP_S), "scancel", "--quiet", "--user=root"]
    if subprocess.run(command, env=environment, capture_output=True, check=False).returncode:
        return  # the controller does not answer
    deadline = time.monotonic() + STOP_S
    while time.monotonic() < deadline:
        listed = subprocess.run(["squeue", "-h"], env=environment, capture_output=True, text=True, check=False)
        if not listed.stdout.strip():
            return
        time.sleep(0.2)


def launch(folder: Path, name: str, command: list[str], environment: dict[str, str]) -> None:
    """Start a daemon as a foreground process in its own session, and record its process id."""
    with (folder / "log" / f"{name}.out").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    (folder / "pid" / f"{name}.started").write_text(str(process.pid))


def wait_for(what: str, is_up: "object", folder: Path) -> None:
    """Wait until ``is_up()`` is true.

    Args:
        what: subject of the error message.
        folder: folder of the cluster, for the error message.

    Raises:
        RuntimeError: it takes longer than START_S.
    """
    assert callable(is_up)
    deadline = time.monotonic() + START_S
    while not is_up():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not come up within {START_S:.0f} s. See {folder}/log.")
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def free_ports(count: int) -> list[int]:
    """Free TCP ports of this host."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()


def environment_of(folder: Path) -> dict[str, str]:
    """Environment in which daemons and commands find the cluster."""
    return {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf", "PATH": search_path()}


def search_path() -> str:
    """PATH with sbin, where the daemons are and which is not on every user's PATH."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


if __name__ == "__main__":
    sys.exit(main())
