"""Plant faults, a line each, and report which of them the tests catch: python tests/mutations.py [--output FILE].

Each fault is planted in a copy of the tree. The tests that should catch it run first; if they pass, the other tests of
make test run, and after them the cases that only make test-all has. A fault is caught by the first test that fails.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FEW = ["-m", "not exhaustive"]


@dataclass(frozen=True)
class Fault:
    """One changed line, or part of a line."""

    name: str
    file: str
    """Below megatron_rl."""
    old: str
    """Occurs once in the file."""
    new: str
    tests: str
    """Files below tests that should catch it, separated by blanks."""


@dataclass(frozen=True)
class Outcome:
    """Which tests caught a fault; None: none did, or they were not needed."""

    test: str | None
    test_all: str | None
    seconds: float


ALGORITHMS, BATCHING, LAYOUTS = "unit/test_algorithms.py", "unit/test_batching.py", "distributed/test_layouts.py"
FAULTS = [
    # algorithms
    Fault("clip bounds swapped", "algorithms/losses.py", "ratio.clamp(1 - clip.low, 1 + clip.high)",
          "ratio.clamp(1 - clip.high, 1 + clip.low)", ALGORITHMS),
    Fault("dual clip at positive advantages", "algorithms/losses.py", "torch.where(advantages < 0, clip.dual",
          "torch.where(advantages > 0, clip.dual", ALGORITHMS),
    Fault("value clip takes the smaller error", "algorithms/losses.py", "loss=torch.maximum(unclipped, clipped)",
          "loss=torch.minimum(unclipped, clipped)", ALGORITHMS),
    Fault("GSPO without gradient", "algorithms/losses.py", "tokens.logprobs - tokens.logprobs.detach()",
          "0 * tokens.logprobs.detach()", ALGORITHMS),
    Fault("GRPO divides by the population std", "algorithms/advantages.py", "members.std() + settings.epsilon",
          "members.std(correction=0) + settings.epsilon", ALGORITHMS),
    Fault("RLOO divides by n", "algorithms/advantages.py", "- members) / (members.numel() - 1))",
          "- members) / members.numel())", ALGORITHMS),
    Fault("GAE bootstraps after the last token", "algorithms/advantages.py", "torch.zeros_like(values[:1])]",
          "values[-1:]]", ALGORITHMS),
    Fault("k3 reversed", "algorithms/kl.py", "log_ratio = ref_logprobs - logprobs", "log_ratio = logprobs - ref_logprobs",
          ALGORITHMS),
    Fault("sequence mean counts empty responses", "algorithms/loss_weights.py", "has_loss.sum().double()",
          "torch.tensor(float(lengths.numel()))", f"{ALGORITHMS} {BATCHING}"),
    Fault("mask ignores the lower bound", "algorithms/importance.py", "(ratio >= low) & (ratio <= high)", "(ratio <= high)",
          "unit/test_rollout_correction.py"),
    Fault("entropy is penalised", "algorithms/objective.py", "total - self.entropy_coef * entropy",
          "total + self.entropy_coef * entropy", f"{ALGORITHMS} distributed/test_goldens.py"),
    Fault("KL penalty of one token", "algorithms/advantages.py", "values.flip(0).cumsum(0).flip(0)", "values",
          f"{ALGORITHMS} unit/test_trainer_advantages.py"),
    # batching
    Fault("last token of a pack leaks into the next", "batching/align.py", "moved[0, last] = 0", "moved[0, last - 1] = 0",
          BATCHING),
    Fault("log-probabilities one position late", "batching/align.py", "[F.pad(row[:-1], (1, 0)) for row in rows]",
          "[F.pad(row[1:], (0, 1)) for row in rows]", BATCHING),
    Fault("loss weight of another sequence", "batching/batch.py", "weights[index - members[0]]", "weights[0]", BATCHING),
    Fault("reward at the first token", "batching/sequences.py", "last = int(sampled.max())", "last = int(sampled.min())",
          f"{BATCHING} unit/test_trainer_advantages.py"),
    Fault("groups with the lowest std are kept", "batching/selection.py", "key=lambda index: -_reward_std(",
          "key=lambda index: _reward_std(", BATCHING),
    # weights
    Fault("row slice of another rank", "weights/layout.py", "(rank * n, (rank + 1) * n)), ((0, rows)",
          "((size - 1 - rank) * n, (size - rank) * n)), ((0, rows)", "unit/test_weights.py distributed/test_model.py"),
    Fault("one row of the vocabulary is missing", "weights/layout.py", "min((rank + 1) * n, vocab_size)",
          "min((rank + 1) * n, vocab_size - 1)", "unit/test_weights.py"),
    Fault("gate and up swapped", "weights/layout.py", "_rows(gate, rank * n, 0, n, rest), _rows(up, rank * n, n, n, rest)",
          "_rows(up, rank * n, 0, n, rest), _rows(gate, rank * n, n, n, rest)",
          "unit/test_weights.py distributed/test_model.py"),
    Fault("every query group reads the first key", "weights/layout.py", "(k, group * head_dim, head_dim)",
          "(k, 0, head_dim)", "unit/test_weights.py"),
    Fault("experts are split by the tensor-parallel rank", "weights/layout.py",
          "layout.slices(self.etp_rank, self.etp_size)", "layout.slices(self.tp_rank, self.etp_size)",
          "distributed/test_conversion.py distributed/test_layouts.py"),
    Fault("tensors cross nodes more than once", "weight_sync/plan.py", "if rank != entry], [entry]",
          "if rank != entry], holders", "unit/test_weight_sync_plan.py distributed/test_weight_transfer.py"),
    Fault("the first push is not verified", "weight_sync/push.py", "is_checked = self._num_pushes == 0 or",
          "is_checked = self._num_pushes == 1 or", "distributed/test_weight_transfer.py"),
    Fault("adapters are not scaled", "mcore/lora.py", "return self._scale * torch.cat", "return torch.cat",
          "distributed/test_lora.py"),
    # mcore
    Fault("gradient ignores the temperature", "mcore/model/logprobs.py", "gradient.div_(head.temperature)",
          "gradient.mul_(1.0)", "unit/test_logprobs.py"),
    Fault("entropy gradient has the wrong sign", "mcore/model/logprobs.py", ".mul_(-grad_entropy[span]",
          ".mul_(grad_entropy[span]", "unit/test_logprobs.py"),
    Fault("padding of the vocabulary gets probability", "mcore/model/logprobs.py",
          "min(columns, max(0, vocab_size - self.first))", "columns",
          "unit/test_logprobs.py distributed/test_layouts.py distributed/test_goldens.py"),
    Fault("response ratios of a rank's own tokens", "mcore/policy_loss.py", "if self._context_group is not None:",
          "if False:", LAYOUTS),
    Fault("gradients are not reduced", "mcore/learner.py", "schedule.finalize_model_grads_func = finalize_model_grads",
          "schedule.finalize_model_grads_func = None", LAYOUTS),
    Fault("adapter gradients under sequence parallelism", "mcore/lora.py",
          "replicated.sequence_parallel = sequence_parallel", "replicated.sequence_parallel = False",
          "distributed/test_lora.py"),
    Fault("offloaded optimizer states are not restored", "mcore/offload.py",
          '"optimizer": [_OffloadedStorage(storage, keep=True)', '"optimizer": [_OffloadedStorage(storage, keep=False)',
          LAYOUTS),
    Fault("the hosted reference stays in the policy", "mcore/reference.py",
          "_copy(self._policy_backup, self._policy.parameters)", "pass", "distributed/test_memory.py"),
    # checkpointing
    Fault("the schedule is not restored", "mcore/checkpoint.py", 'learner.scheduler.load_state_dict(loaded["scheduler"])',
          "pass", "distributed/test_checkpoint.py distributed/test_invariance.py"),
    Fault("the optimizer is not restored", "mcore/checkpoint.py", 'learner.optimizer.load_state_dict(loaded["optimizer"])',
          "pass", "distributed/test_checkpoint.py"),
    Fault("the random state is not restored", "checkpointing/manager.py",
          "set_random_state(torch.load(saved, weights_only=True))", "torch.load(saved, weights_only=True)",
          "distributed/test_checkpoint.py distributed/test_invariance.py e2e/test_torchrun.py"),
    Fault("unfinished samples are lost", "checkpointing/manager.py", "if in_flight:", "if in_flight and not again:",
          "distributed/test_sampling.py e2e/test_interruptions.py"),
    Fault("one checkpoint too many is kept", "checkpointing/manager.py", "written[-self._config.checkpoint.keep_last :]",
          "written[-self._config.checkpoint.keep_last - 1 :]", "distributed/test_invariance.py e2e/test_command.py"),
    Fault("hashes are not compared", "checkpointing/integrity.py", "if hashes and index % shares == share and",
          "if hashes and index % shares == share + 1 and", "unit/test_integrity.py e2e/test_command.py"),
    # rollouts
    Fault("the stop token is cut off", "rollout/engines/embedded.py", "token_ids=tokens[i, :count],",
          "token_ids=tokens[i, : count - 1],", "engines/test_embedded.py engines/test_contract.py"),
    Fault("the newest token is not attended to", "rollout/engines/decoder.py", "<= positions[:, None])[:, None, None]",
          "< positions[:, None])[:, None, None]", "engines/test_embedded.py engines/test_with_policy.py"),
    Fault("top-p drops the token that reaches it", "rollout/engines/sampling.py",
          "probabilities.cumsum(-1) - probabilities >=", "probabilities.cumsum(-1) >=",
          "engines/test_embedded.py engines/test_contract.py"),
    Fault("observations are trained on", "rollout/multi_turn.py", "part.policy_version if isinstance(part, Completion) else -1",
          "part.policy_version if isinstance(part, Completion) else 0", "distributed/test_sampling.py"),
    Fault("stale samples are kept one version longer", "rollout/partial.py", "version < oldest_allowed",
          "version < oldest_allowed - 1", "distributed/test_sampling.py"),
    # rewards and evaluation
    Fault("countdown accepts unused numbers", "rewards/countdown.py", "sorted(used) == sorted(numbers)",
          "set(used) <= set(numbers)", "unit/test_rewards.py"),
    Fault("truncated responses match", "rewards/exact.py", 'sample.finish_reason != "stop" or', "", "unit/test_rewards.py"),
    Fault("the first box is graded", "rewards/math.py", 'text.rfind("\\\\boxed{")', 'text.find("\\\\boxed{")',
          "unit/test_rewards.py"),
    Fault("pass@k draws with replacement", "reporting/stats.py",
          "math.prod(1.0 - k / n for n in range(num_samples - num_right + 1, num_samples + 1))",
          "(1.0 - num_right / num_samples) ** k", "unit/test_evaluation.py unit/test_metrics.py"),
    Fault("a right answer equals a wrong one in the vote", "evaluation/grading.py", "return one.right and other.right",
          "return one.right or other.right", "unit/test_evaluation.py"),
    Fault("the first match is the shown answer", "evaluation/majority_vote.py", "found = match.group(1).strip()",
          "found = found or match.group(1).strip()", "unit/test_evaluation.py"),
    Fault("one wrong reference answer is enough to be wrong", "evaluation/grading.py",
          "right = not response.failure and any(", "right = not response.failure and all(", "unit/test_evaluation.py"),
]  # fmt: skip


def main() -> int:
    """Run the command; the exit status is 1 if a fault was not caught by make test."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="faults whose name contains this text")
    parser.add_argument("--workers", type=int, default=2, help="faults that are tested at the same time")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the table to a file")
    args = parser.parse_args()
    faults = [fault for fault in FAULTS if args.only in fault.name]
    for fault in faults:
        count = (ROOT / "megatron_rl" / fault.file).read_text().count(fault.old)
        assert count == 1, f"{fault.name}: {fault.old!r} occurs {count} times in {fault.file}"
    with ThreadPoolExecutor(args.workers) as pool:
        rows = [row(fault, outcome) for fault, outcome in zip(faults, pool.map(plant, faults), strict=True)]
    table = "| fault | in | caught by make test | by make test-all | seconds |\n|---|---|---|---|---|\n" + "".join(rows)
    print(table)
    if args.output:
        args.output.write_text(table)
    return int("| no |" in table)


def plant(fault: Fault) -> Outcome:
    """Plant a fault in a copy of the tree and run the tests until one fails."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "runs", "wandb", "build", "*.egg-info"))
        shutil.copy(ROOT / ".gitignore", tree)
        path = tree / "megatron_rl" / fault.file
        path.write_text(path.read_text().replace(fault.old, fault.new))
        likely = [f"tests/{name}" for name in fault.tests.split()]
        others = ["tests", "--ignore", "tests/slurm", *(word for name in likely for word in ("--ignore", name))]
        caught = first_failure(tree, [*FEW, *likely]) or first_failure(tree, [*FEW, *others])
        caught_by_all = caught or first_failure(tree, [*likely]) or first_failure(tree, others)
        print(f"{fault.name}: {caught_by_all or 'not caught'}", file=sys.stderr, flush=True)
        return Outcome(caught, caught_by_all, time.monotonic() - start)


def first_failure(tree: Path, arguments: Sequence[str]) -> str | None:
    """Return the first test that fails in a tree; None if all pass.

    Raises:
        RuntimeError: pytest could not run the tests.
    """
    command = [sys.executable, "-m", "pytest", "--exitfirst", "--quiet", *arguments]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode not in (1, 2) or failed is None:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
    return failed[1]


def row(fault: Fault, outcome: Outcome) -> str:
    """Return the row of a fault."""
    caught = [one.replace("tests/", "") if one else "no" for one in (outcome.test, outcome.test_all)]
    by_all = "the same" if outcome.test else caught[1]
    return f"| {fault.name} | {fault.file} | {caught[0]} | {by_all} | {outcome.seconds:.0f} |\n"


if __name__ == "__main__":
    sys.exit(main())
