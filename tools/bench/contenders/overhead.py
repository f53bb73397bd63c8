"""The update alone: Megatron's forward, backward and optimizer against transformers' on the same batch.

Each uses its best layout of the batch: Megatron packs the sequences; transformers stacks them, as they have equal
lengths, and computes logits for the responses only. Both clip the gradient and use AdamW.
"""

import sys
from typing import Any

import torch

from contenders.ours import OurLoop
from contenders.reference import Learner
from contenders.worker import Clock, serve
from contenders.workload import Workload
from megatron_rl.metrics.metric import Max

TOLERANCE = 1e-3


class Overhead:
    """Both learners, which update in turns on the same rollouts."""

    def __init__(self, workload: Workload) -> None:
        self._megatron = OurLoop(workload)
        self._transformers = Learner(workload)
        _, self._batch = self._megatron.rollouts(Clock())
        sequences = self._batch.sequences
        self._tokens = torch.stack([sequence.token_ids for sequence in sequences])
        self._num_new = workload.new_tokens
        self._advantages = torch.stack([sequence.advantages[0] for sequence in sequences])
        self._count = 0

    def step(self, clock: Clock) -> dict[str, Any]:
        """Make one update of each learner, starting with either in turn; return the work that was done."""
        norms = {}
        order = ("megatron", "transformers") if self._count % 2 else ("transformers", "megatron")
        for name in order:
            with clock.phase(name):
                norms[name] = self._update_megatron() if name == "megatron" else self._update_transformers()
        if self._count == 0 and abs(norms["megatron"] / norms["transformers"] - 1) > TOLERANCE:
            raise SystemExit(
                f"gradient norms of the first update differ: {norms}. The two updates do not compute the same."
            )
        self._count += 1
        return {
            "sequences": len(self._tokens),
            "new_tokens": len(self._tokens) * self._num_new,
            "tokens": self._tokens.numel(),
            "updates": 1,
            "gradient_norms": norms,
        }

    def weights(self) -> float:
        """Sum of all of Megatron's weights."""
        return self._megatron.weights()

    def num_parameters(self) -> int:
        """Number of parameters of each learner, which must agree."""
        megatron, transformers = self._megatron.num_parameters(), self._transformers.num_parameters()
        if megatron != transformers:
            raise SystemExit(f"Megatron has {megatron} parameters, transformers {transformers}. They must be the same.")
        return megatron

    def _update_megatron(self) -> float:
        norm = self._megatron.policy.update(self._batch)["actor/grad_norm"]
        assert isinstance(norm, Max)
        return norm.value

    def _update_transformers(self) -> float:
        return self._transformers.update(self._tokens, self._num_new, self._advantages)


def main() -> None:
    """Entry point of the process."""
    pair = Overhead(Workload.from_json(sys.argv[1]))
    serve({"parameters": pair.num_parameters()}, pair.step, pair.weights)


if __name__ == "__main__":
    main()
