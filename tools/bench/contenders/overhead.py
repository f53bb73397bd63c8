"""The two learners alone: Megatron's forward, backward and optimizer against transformers' on one and the same batch.

Each lays the batch out as it does best: Megatron packs the sequences one behind the other, transformers stacks
them, as they are equally long, and computes logits for the response alone. Both clip the gradient and use AdamW.
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
    """Both learners, in turns, on the same rollouts."""

    def __init__(self, workload: Workload) -> None:
        self._ours = OurLoop(workload)
        self._theirs = Learner(workload)
        _, self._batch = self._ours.rollouts(Clock())
        sequences = self._batch.sequences
        self._tokens = torch.stack([sequence.token_ids for sequence in sequences])
        self._num_new = workload.new_tokens
        self._advantages = torch.stack([sequence.advantages[0] for sequence in sequences])
        self._count = 0

    def step(self, clock: Clock) -> dict[str, Any]:
        """One update of each; who begins alternates."""
        norms = {}
        order = ("megatron", "transformers") if self._count % 2 else ("transformers", "megatron")
        for name in order:
            with clock.phase(name):
                norms[name] = self._update_ours() if name == "megatron" else self._update_theirs()
        if self._count == 0 and abs(norms["megatron"] / norms["transformers"] - 1) > TOLERANCE:
            raise SystemExit(f"gradient norms of the first update differ: {norms}. The two do not do the same work.")
        self._count += 1
        return {
            "sequences": len(self._tokens),
            "new_tokens": len(self._tokens) * self._num_new,
            "tokens": self._tokens.numel(),
            "updates": 1,
            "gradient_norms": norms,
        }

    def weights(self) -> float:
        """The sum of all of Megatron's weights."""
        return self._ours.weights()

    def num_parameters(self) -> int:
        """Of each of the two."""
        ours, theirs = self._ours.num_parameters(), self._theirs.num_parameters()
        if ours != theirs:
            raise SystemExit(f"Megatron has {ours} parameters, transformers {theirs}. They must be the same.")
        return ours

    def _update_ours(self) -> float:
        norm = self._ours.policy.update(self._batch)["actor/grad_norm"]
        assert isinstance(norm, Max)
        return norm.value

    def _update_theirs(self) -> float:
        return self._theirs.update(self._tokens, self._num_new, self._advantages)


def main() -> None:
    """The process."""
    pair = Overhead(Workload.from_json(sys.argv[1]))
    serve({"parameters": pair.num_parameters()}, pair.step, pair.weights)


if __name__ == "__main__":
    main()
