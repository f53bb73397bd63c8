"""Profile single steps: a timeline, a table of operations, a memory snapshot."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_rl.config.performance import ProfilingSection
from megatron_rl.types import ParallelContext

ROWS = 40


@contextmanager
def profiled(config: ProfilingSection, folder: Path, step: int, parallel: ParallelContext) -> Iterator[None]:
    """Profile the body if this step and rank are selected, and write into ``folder``:

    step_N_rank_R.json, a timeline for chrome://tracing or Perfetto that shows the spans of the step;
    step_N_rank_R.txt, the operations that took longest; step_N_rank_R_memory.pickle, every allocation,
    for pytorch.org/memory_viz.
    """
    if step not in config.steps or parallel.rank not in config.ranks:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    name = folder / f"step_{step}_rank_{parallel.rank}"
    cuda = parallel.device.type == "cuda"
    if config.memory_snapshot:
        torch.cuda.memory._record_memory_history()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, profile_memory=True) as profiler:
        yield
    profiler.export_chrome_trace(f"{name}.json")
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    Path(f"{name}.txt").write_text(profiler.key_averages().table(sort_by=order, row_limit=ROWS))
    if config.memory_snapshot:
        torch.cuda.memory._dump_snapshot(f"{name}_memory.pickle")
        torch.cuda.memory._record_memory_history(enabled=None)
