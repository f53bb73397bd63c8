"""What the tests of engines ask for, and how they gather it."""

from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_rl.models import read_model_spec
from megatron_rl.rollout.engine import EnginePlace, EngineSetup, Finished, Request
from megatron_rl.rollout.sampling import sample_seed
from megatron_rl.types import Completion, SamplingParams
from tests.toys import VOCAB

ALONE = EnginePlace(index=0, count=1, tp_rank=0, tp_size=1, leader=0, group=None)
# heads that the engines' CPU kernels take
SIZES = {"hidden_size": 128, "head_dim": 32}


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
