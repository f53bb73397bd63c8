"""Requests, setups and failing engines that the tests of engines share."""

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
# sizes that the engines' CPU kernels support
SIZES = {"hidden_size": 128, "head_dim": 32}


class Interruption:
    """Interrupts every engine of the tests after ``queries_left`` queries of ``is_due``."""

    def __init__(self) -> None:
        self.queries_left = math.inf

    def is_due(self) -> bool:
        self.queries_left -= 1
        return self.queries_left < 0


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
        is_interrupted=INTERRUPTION.is_due,
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


def collect(finished_samples: Iterator[Finished]) -> dict[tuple[int, int], Completion]:
    results = {}
    for finished in finished_samples:
        assert (finished.key, finished.sample) not in results
        results[finished.key, finished.sample] = finished.completion
    return results


def kill(engine: Any, name: str) -> None:
    """Kill the process of an engine; an engine without a process of its own fails in its next step."""
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


class DyingEngine:
    """An engine that dies ``deaths`` times after two results, and ``deaths_in_pushes`` times during a push."""

    def __init__(self, engine: Any, name: str, deaths: int, deaths_in_pushes: int = 0) -> None:
        self._engine, self._name, self.deaths_left = engine, name, deaths
        self.push_deaths_left, self._own_death = deaths_in_pushes, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        for number, finished in enumerate(self._engine.generate(*arguments, **options)):
            yield finished
            if number == 1 and self.deaths_left:
                self.deaths_left -= 1
                kill(self._engine, self._name)

    @property
    def death(self) -> str:
        return self._own_death or str(self._engine.death)

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        if not self.push_deaths_left:
            self._engine.load_weights(tensors, version)
            return
        self.push_deaths_left -= 1
        next(tensors)
        if self._name != "sglang":  # the other engines have no process that could end in a push
            self._own_death = "killed by the test"
            raise EngineDied(self._own_death)
        kill(self._engine, self._name)
        self._engine.load_weights(tensors, version)

    def restart(self) -> None:
        self._engine.__dict__.pop("_step", None)
        self._own_death = ""
        self._engine.restart()
