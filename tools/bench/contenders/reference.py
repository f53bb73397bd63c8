"""The contender reference: GRPO in plain PyTorch on transformers' Qwen2, as short as possible."""

import random
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from contenders.reference_decoder import ReferenceDecoder
from contenders.worker import Clock, serve
from contenders.workload import BETAS, CLIP_GRAD, STD_EPSILON, Workload

CLIP_RATIO = 0.2


class Learner:
    """The model, its log-probabilities and its update."""

    def __init__(self, workload: Workload) -> None:
        torch.set_num_threads(workload.threads)
        self.model = AutoModelForCausalLM.from_pretrained(
            workload.folder, dtype=torch.float32, attn_implementation="sdpa"
        ).train()
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=workload.lr, betas=BETAS, weight_decay=0.0, fused=True
        )

    def logprobs(self, tokens: Tensor, num_new: int) -> Tensor:
        """Log-probabilities [N, num_new] of the last tokens of ``tokens`` [N, L]; computes only their logits."""
        logits = self.model(input_ids=tokens, use_cache=False, logits_to_keep=num_new + 1).logits[:, :-1]
        labels = tokens[:, -num_new:]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return -losses.view(labels.shape)

    def update(self, tokens: Tensor, num_new: int, advantages: Tensor) -> float:
        """Make one clipped policy gradient update on the mean over tokens; return the gradient norm before clipping."""
        logprobs = self.logprobs(tokens, num_new)
        ratio = (logprobs - logprobs.detach()).exp()  # 1: with one update per batch the weights have not changed
        clipped = ratio.clamp(1 - CLIP_RATIO, 1 + CLIP_RATIO)
        loss = -torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None]).mean()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_GRAD)
        self._optimizer.step()
        return float(norm)

    def weights(self) -> float:
        """Sum of all weights."""
        return sum(float(parameter.detach().double().sum()) for parameter in self.model.parameters())

    def num_parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())


class ReferenceLoop:
    """Generation, rewards and update of GRPO."""

    def __init__(self, workload: Workload) -> None:
        torch.manual_seed(workload.seed)
        self.learner = Learner(workload)
        self._workload = workload
        self._tokenizer = AutoTokenizer.from_pretrained(workload.folder)
        self._prompts = workload.prompts()
        self._draw = random.Random(workload.seed)
        self._decoder = ReferenceDecoder(self.learner.model, longest=512)

    def step(self, clock: Clock) -> dict[str, Any]:
        """Make one step of GRPO; return the work that it did."""
        work = self._workload
        texts = self._draw.sample(self._prompts, work.num_prompts)
        with clock.phase("generation"):
            prompts = self._tokenizer(texts, return_tensors="pt").input_ids
            new = self._decoder.sample(prompts, work.group_size, work.new_tokens)
            responses = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        rewards = torch.tensor([float(self._draw.random() < 0.5) for _ in responses]).view(-1, work.group_size)
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + STD_EPSILON)
        tokens = torch.cat([prompts.repeat_interleave(work.group_size, 0), new], 1)
        with clock.outside("logprobs"), torch.no_grad():
            self.learner.logprobs(tokens, work.new_tokens)
        with clock.phase("update"):
            self.learner.update(tokens, work.new_tokens, advantages.flatten())
        return {"sequences": len(responses), "new_tokens": new.numel(), "tokens": tokens.numel(), "updates": 1}


def main() -> None:
    """Entry point of the process."""
    loop = ReferenceLoop(Workload.from_json(sys.argv[1]))
    serve({"parameters": loop.learner.num_parameters()}, loop.step, loop.learner.weights)


if __name__ == "__main__":
    main()
