"""What the tests of engines ask for, and how they gather it."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_rl.errors import EngineDied
from megatron_rl.models import read_model_spec
from megatron_rl.rollout.engines.base import EnginePlace, EngineSetup, Finished, Request
from megatron_rl.rollout.engines.sampling import sample_seed
from megatron_rl.types import Completion, SamplingParams
from tests.toys import VOCAB

ALONE = EnginePlace(index=0, count=1, tp_rank=0, tp_size=1, leader=0, group=None)
# heads that the engines' CPU kernels take
SIZES = {"hidden_size": 128, "head_dim": 32}


class Interruption:
    """Asks to stop after so many questions, of every engine of the tests."""

    def __init__(self) -> None:
        self.after = math.inf

    def is_asked(self) -> bool:
        self.after -= 1
        return self.after < 0


INTERRUPTION = Interruption()


def setup_of(folder: Path, max_num_sequences: int = 64) -> EngineSetup:
    return EngineSetup(
        folder=str(folder),
        spec=read_model_spec(folder),
        place=ALONE,
        device=torch.device("cpu"),
        dtype=torch.float32,
        max_num_sequences=max_num_sequences,
        max_model_len=512,
        local_rank=0,
        is_interrupted=INTERRUPTION.is_asked,
    )


def params(**changes: object) -> SamplingParams:
    fields = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 12, "stop_token_ids": (1,), **changes}
    return SamplingParams(**fields)  # type: ignore[arg-type]


def requests(count: int = 5, samples: int = 3) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    return [
        Request(
            key=key,
            token_ids=torch.randint(3, VOCAB, (2 + 3 * (key % 3),), generator=generator),
            seeds=tuple(sample_seed(0, key, i) for i in range(samples)),
        )
        for key in range(count)
    ]


def collect(found: Iterator[Finished]) -> dict[tuple[int, int], Completion]:
    results = {}
    for finished in found:
        assert (finished.key, finished.sample) not in results
        results[finished.key, finished.sample] = finished.completion
    return results


def kill(engine: Any, name: str) -> None:
    """End a real engine in the middle of its work: its process, or its next step where it has none of its own."""
    if name == "sglang":
        scheduler = next(iter(engine._watch._processes))
        scheduler.kill()
        scheduler.join()
        return

    def die(*_: Any, **__: Any) -> None:
        raise EngineDied("killed by the test") if name == "embedded" else RuntimeError("killed by the test")

    if name == "vllm":
        engine._llm.llm_engine.step = die
    else:
        engine._step = die


class Dying:
    """The engine with an end after so many results, again and again, or in the middle of pushes."""

    def __init__(self, engine: Any, name: str, deaths: int, deaths_in_pushes: int = 0) -> None:
        self._engine, self._name, self.left = engine, name, deaths
        self.left_in_pushes, self._own_death = deaths_in_pushes, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        for number, one in enumerate(self._engine.generate(*arguments, **options)):
            yield one
            if number == 1 and self.left:
                self.left -= 1
                kill(self._engine, self._name)

    @property
    def death(self) -> str:
        return self._own_death or str(self._engine.death)

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        if not self.left_in_pushes:
            self._engine.load_weights(tensors, version)
            return
        self.left_in_pushes -= 1
        next(tensors)
        if self._name != "sglang":  # the others have no process that could end in a push
            self._own_death = "killed by the test"
            raise EngineDied(self._own_death)
        kill(self._engine, self._name)
        self._engine.load_weights(tensors, version)

    def restart(self) -> None:
        self._engine.__dict__.pop("_step", None)
        self._own_death = ""
        self._engine.restart()
