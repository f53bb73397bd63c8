"""--dry-run: check a configuration without building a model or writing a file."""

from megatron_rl.checkpointing.resume import check_resumable
from megatron_rl.config import RunConfig, dump_config
from megatron_rl.mcore.runtime.parallel import launcher_world
from megatron_rl.run_folder import RunFolder
from megatron_rl.trainer.inputs import load_inputs


def dry_run(config: RunConfig, resume: str, *, show: bool) -> None:
    """Run all checks of a real start that need no model.

    Args:
        show: print the resolved configuration and a summary.

    Raises:
        MegatronRLError: as a real start would raise.
    """
    _, world_size, _ = launcher_world()
    inputs = load_inputs(config, world_size)
    folder = RunFolder(config.run.output_dir)
    folder.check_writable()
    checkpoint = folder.find_resume(resume)
    if checkpoint is not None:
        check_resumable(checkpoint, config)
    if not show:
        return
    print(dump_config(config), end="")
    held_out = len(inputs.validation.prompts) if inputs.validation else 0
    print(
        f"# ok: {world_size} ranks, {len(inputs.train.prompts)} training prompts "
        f"({inputs.train.num_overlong} over-long dropped), {held_out} held-out prompts, "
        + (f"resumes from {checkpoint}" if checkpoint else "begins at step 0")
    )
