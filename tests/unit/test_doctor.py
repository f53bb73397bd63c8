"""The doctor: its findings, the hosts and ranks that it names, and the fixes that it suggests."""

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl.doctor import host
from megatron_rl.doctor.finding import error, ok, report, warning, worst
from megatron_rl.doctor.speeds import Speeds, check_speeds
from megatron_rl.planning.hardware import read_hardware
from tests import forked
from tests.toys import write_config

ROOT = Path(__file__).parents[2]


def test_equal_findings_of_several_hosts_share_a_line() -> None:
    findings = [
        ("a", ok("gpu", "8 x H100")), ("b", ok("gpu", "8 x H100")),
        ("b", error("disk", "1 GB are free", "make room")),
    ]  # fmt: skip
    assert report(findings).splitlines() == [
        "ok      gpu          8 x H100",
        "error   disk         1 GB are free [b]  -> make room",
    ]
    assert worst(findings) == "error"
    assert worst(findings[:2]) == "ok"
    assert worst([("a", warning("speed", "slow", "leave it out"))]) == "warning"


def test_slow_ranks_and_wrong_clocks_are_named() -> None:
    fine = [Speeds(host=f"node{i}", tflops=600.0, memory_gb_s=2500.0, clocks_s=(100.0, 101.0)) for i in range(4)]
    assert worst(check_speeds(fine, 300.0)) == "ok"
    assert "300.00 GB/s all-reduce over 4 ranks of 4 hosts" in report(check_speeds(fine, 300.0))
    slow = [*fine[:3], Speeds(host="node9", tflops=200.0, memory_gb_s=2500.0, clocks_s=(100.0, 101.0))]
    text = report(check_speeds(slow, 300.0))
    assert "warning speed        rank 3: 200 TFLOP/s, 2500 GB/s; median 600 and 2500 [node9]" in text
    assert "sbatch --exclude" in text
    late = [*fine[:3], Speeds(host="node9", tflops=600.0, memory_gb_s=2500.0, clocks_s=(107.0, 108.0))]
    assert "error   clock        7.0 s apart [node9]" in report(check_speeds(late, 300.0))
    busy = [*fine[:3], Speeds(host="node9", tflops=600.0, memory_gb_s=2500.0, clocks_s=(107.0, 101.1))]
    assert "clock" not in report(check_speeds(busy, 300.0))


def test_versions_are_compared_by_their_numbers() -> None:
    assert host.version_numbers("0.16.1rc0+cpu") == (0, 16, 1)
    assert host.version_numbers("2.13.0") == (2, 13, 0)
    assert host.version_numbers("unknown") == ()


def test_untested_versions_get_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    real = host.importlib.metadata.version
    monkeypatch.setattr(
        host.importlib.metadata, "version", lambda name: "0.25.0" if name == "megatron-core" else real(name)
    )
    warnings = [one for one in host.versions(None) if one.grade == "warning"]
    assert any(one.detail == "megatron-core 0.25.0" and "0.16.1 to below 0.20" in one.fix for one in warnings)


def test_full_disks_small_hosts_and_unwritable_folders_are_errors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 3 * 10**9))
    assert host.disk(tmp_path / "not" / "yet").grade == "error"
    assert "3 GB are free" in host.disk(tmp_path).detail
    monkeypatch.setattr(host, "MIN_HOST_GB", 10.0**6)
    assert host.memory().grade == "error"
    assert host.file_system(tmp_path).grade in ("ok", "warning")
    assert list(tmp_path.iterdir()) == []
    assert host.file_system(Path("/proc/self")).grade == "error"


def test_the_command_reports_whether_a_run_can_start(toy_model: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(tmp_path, toy_model("qwen2"))

    def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "tools/doctor.py", "--config", str(config), *arguments]
        return forked.run(command, env={**os.environ, **environment})

    fine = doctor("--measure", str(tmp_path / "here.yaml"))
    assert fine.returncode == 0, fine.stderr + fine.stdout
    assert "qwen2, 2 layers" in fine.stdout
    assert "ok      data         64 training prompts, 8 held-out prompts" in fine.stdout
    assert "ok      checkpoint   none: starts at step 0" in fine.stdout
    assert "layout" not in fine.stdout  # the number of ranks is unknown
    assert read_hardware(str(tmp_path / "here.yaml")).tflops > 0
    broken = doctor("model.path=nowhere", "rollout.engine=sglang", "rollout.top_k=0")
    assert broken.returncode == 1
    assert "error   model" in broken.stdout
    assert "nowhere" in broken.stdout
    assert "error   engine       sglang cannot be imported" in broken.stdout
    wrong = ("data.train.path=nothing", "--resume", "nowhere")
    broken = doctor(*wrong, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29555")
    assert "ok      layout       it can be trained by 1 ranks" in broken.stdout
    assert "error   data         data source path (task)='nothing'" in broken.stdout, broken.stdout
    assert "error   checkpoint   --resume nowhere: no checkpoint there." in broken.stdout
