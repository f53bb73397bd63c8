"""The contender TRL: its GRPOTrainer with the fastest settings that work on a CPU.

These are transformers' ``generate`` with its dynamic cache and SDPA attention, one batch, no logging and no files. It
runs in an interpreter with trl and imports nothing of megatron_rl. With one update per batch TRL does not compute old
log-probabilities: it takes those of the update.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import GRPOConfig, GRPOTrainer

from contenders.worker import Channel, Clock, now
from contenders.workload import BETAS, CLIP_GRAD, Workload


class StepCallback(TrainerCallback):
    """Callback that waits before every step and reports after it, including the trainer's bookkeeping between steps."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._channel = Channel()
        self.clock = Clock()
        self.work: dict[str, Any] = {}
        self.update_start = now()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        parameters = sum(parameter.numel() for parameter in self._model.parameters())
        self._channel.send(parameters=parameters, weights=self._weights())
        self._next()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.add("update", self.update_start)
        costs = self.clock.result()
        self._channel.send(work=self.work, costs=costs, weights=self._weights())
        self._next()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with self.clock.phase(name):
            yield

    def _next(self) -> None:
        self._channel.wait()
        self.clock = Clock()

    def _weights(self) -> float:
        return sum(float(parameter.detach().double().sum()) for parameter in self._model.parameters())


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer that records the start and end of its phases."""

    step_callback: StepCallback

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with self.step_callback.phase("generation"):
            return super()._generate(*args, **kwargs)

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        inputs = super()._prepare_inputs(*args, **kwargs)
        if self.model.training:
            mask = inputs["completion_mask"]
            self.step_callback.work = {
                "sequences": len(mask),
                "new_tokens": int(mask.sum()),
                "tokens": int(mask.sum()) + int(inputs["prompt_mask"].sum()),
                "updates": 1,
            }
            self.step_callback.update_start = now()
        return inputs


def main() -> None:
    """Entry point of the process."""
    workload = Workload.from_json(sys.argv[1])
    torch.set_num_threads(workload.threads)
    model = AutoModelForCausalLM.from_pretrained(workload.folder, dtype=torch.float32, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(workload.seed)

    def coin_flip(completions: list[str], **_: Any) -> list[float]:
        return (torch.rand(len(completions), generator=generator) < 0.5).float().tolist()

    config = GRPOConfig(
        output_dir=workload.folder + "/trl",
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=workload.num_sequences,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        num_generations=workload.group_size,
        max_completion_length=workload.new_tokens,
        temperature=1.0,
        beta=0.0,
        loss_type="dapo",
        scale_rewards="group",
        learning_rate=workload.lr,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=0.0,
        max_grad_norm=CLIP_GRAD,
        optim="adamw_torch_fused",
        max_steps=1_000_000,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=workload.seed,
    )
    step_callback = StepCallback(model)
    TimedTrainer.step_callback = step_callback
    trainer = TimedTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": workload.prompts()}),
        reward_funcs=coin_flip,
        processing_class=AutoTokenizer.from_pretrained(workload.folder, padding_side="left"),
        callbacks=[step_callback],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.train()


if __name__ == "__main__":
    main()
