"""Jobs on a real engine: interrupted and continued samples, multi-turn rollouts, and engines that die."""

import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_rl.config.reward import RewardFunctionSection, RewardSection
from megatron_rl.data.templates import load_tokenizer
from megatron_rl.environments import Turn
from megatron_rl.errors import EngineDied
from megatron_rl.metrics.metric import Reduction
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.rollout.collector import Collector, CollectorLimits, Job
from megatron_rl.rollout.engines.base import Engine
from megatron_rl.rollout.engines.sampling import sample_seed
from megatron_rl.rollout.engines.supervisor import EngineSupervisor
from megatron_rl.rollout.multi_turn import MultiTurn
from megatron_rl.rollout.partial import PartialGroup, PartialRollout, begin_group
from megatron_rl.rollout.serialization import group_from_json, group_to_json, read_lines, write_lines
from megatron_rl.types import ParallelContext, Prompt, Rollout
from tests.covering import chosen
from tests.engines.contract import SIZES, DyingEngine, kill, params
from tests.toys import VOCAB

EngineOf = Callable[..., Engine]
# without stop tokens every sample has 24 tokens
ENDLESS = params(stop_token_ids=(), max_new_tokens=24)


@pytest.fixture
def folder(toy_model: Callable[..., Path]) -> Path:
    return toy_model("qwen2", **SIZES)


@pytest.fixture
def collector_of(engine_of: EngineOf, folder: Path) -> Iterator[Callable[..., Collector]]:
    """Return a function that makes a collector of an engine; weights are pushed from the folder."""
    collectors: list[Collector] = []

    def get(engine: Engine | None = None, max_failures: int = 3) -> Collector:
        chosen = engine_of(folder) if engine is None else engine
        supervisor = EngineSupervisor(
            chosen, single_rank(), max_failures=max_failures, push=lambda version: load_from(chosen, folder, version)
        )
        collector = Collector(
            supervisor,
            RewardPool(RewardSection(), {"train": [RewardFunctionSection(name="coin_flip")]}),
            load_tokenizer(str(folder)),
            single_rank(),
            limits=CollectorLimits(reward_failure_fraction=0.0, max_length=512),
        )
        collectors.append(collector)
        return collector

    yield get
    for collector in collectors:
        collector.close()


def load_from(engine: Engine, folder: Path, version: int) -> dict[str, Reduction]:
    engine.load_weights(weights(folder), version)
    return {}


def weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    return iter(load_file(folder / "model.safetensors").items())


def single_rank() -> ParallelContext:
    single = {f"{name}_rank": 0 for name in ("dp", "tp", "pp", "cp", "ep", "etp")}
    sizes = {f"{name}_size": 1 for name in ("dp", "tp", "pp", "vp", "cp", "ep", "etp")}
    return ParallelContext(
        rank=0,
        world_size=1,
        local_rank=0,
        device=torch.device("cpu"),
        groups=None,
        host_group=None,
        store=dist.HashStore(),
        record={},
        **single,
        **sizes,
    )


def groups(count: int = 6, samples: int = 3) -> list[PartialGroup]:
    generator = torch.Generator().manual_seed(0)
    return [
        begin_group(
            Prompt(
                prompt_id=str(index),
                token_ids=torch.randint(3, VOCAB, (3 + index % 3,), generator=generator),
                text="?",
                answer="7",
            ),
            [sample_seed(0, index, k) for k in range(samples)],
        )
        for index in range(count)
    ]


def job(partial_groups: Sequence[PartialGroup], name: str = "job", **changes: Any) -> Job:
    fields = {"params": ENDLESS, "schedule": "dynamic", "functions": "train", "version": 3, **changes}
    return Job(name=name, groups=partial_groups, **fields)


def finished_rollouts(partial_groups: Sequence[PartialGroup]) -> list[Rollout]:
    assert all(group.is_complete for group in partial_groups)
    return [sample for group in partial_groups for sample in group.samples if isinstance(sample, Rollout)]


def trainer_logprobs(folder: Path, rollout: Rollout) -> torch.Tensor:
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        rows = hf(rollout.token_ids[None]).logits[0, :-1].log_softmax(-1)
    return torch.cat([torch.zeros(1), rows.gather(1, rollout.token_ids[1:, None])[:, 0]])


def test_every_sample_of_every_prompt_is_returned_once(collector_of: Callable[..., Collector]) -> None:
    rollouts = finished_rollouts(collector_of().collect(job(groups())))
    assert len(rollouts) == 18
    assert len({rollout.seed for rollout in rollouts}) == 18
    assert {int(rollout.loss_mask.sum()) for rollout in rollouts} == {24}
    assert {rollout.reward for rollout in rollouts} == {0.0, 1.0}


def test_interrupted_samples_continue_where_they_stopped(
    collector_of: Callable[..., Collector], engine_of: EngineOf, folder: Path
) -> None:
    greedy = replace(ENDLESS, temperature=0.0)
    collector = collector_of()
    uninterrupted = finished_rollouts(collector.collect(job(groups(), "whole", params=greedy)))
    partial_groups: Sequence[PartialGroup] = groups()
    for version, lengths in ((3, 10), (4, 20), (5, 24)):
        engine_of(folder).load_weights(weights(folder), version)  # the same weights as another version
        partial_groups = collector.collect(
            job(partial_groups, f"part {version}", params=greedy, max_tokens_per_round=10)
        )
        sampled = [
            s.num_sampled if isinstance(s, PartialRollout) else 24 for group in partial_groups for s in group.samples
        ]
        assert set(sampled) == {lengths}
    for rollout, expected in zip(finished_rollouts(partial_groups), uninterrupted, strict=True):
        assert rollout.token_ids.tolist() == expected.token_ids.tolist()
        versions = rollout.policy_versions[rollout.loss_mask].tolist()
        assert versions == [3] * 10 + [4] * 10 + [5] * 4
        assert set(rollout.policy_versions[~rollout.loss_mask].tolist()) == {-1}
        own = trainer_logprobs(folder, rollout)[rollout.loss_mask]
        torch.testing.assert_close(rollout.rollout_logprobs[rollout.loss_mask], own, rtol=0, atol=1e-5)


def test_surplus_samples_are_aborted_once_enough_groups_are_complete(
    collector_of: Callable[..., Collector], engine_of: EngineOf, folder: Path
) -> None:
    stops = params(stop_token_ids=tuple(range(0, VOCAB, 7)), max_new_tokens=200)  # long-tailed lengths
    collector = collector_of(engine_of(folder, max_num_sequences=9))
    partial_groups = collector.collect(job(groups(count=12), params=stops, num_groups_needed=5))
    complete = [group for group in partial_groups if group.is_complete]
    begun = [s for group in partial_groups for s in group.samples if isinstance(s, PartialRollout) and s.parts]
    assert 5 <= len(complete) < 12
    assert begun, "samples in progress are returned with their tokens so far"
    assert all(part.finish_reason == "abort" for sample in begun for part in sample.parts[-1:])
    partial_groups = collector.collect(job(partial_groups, "rest", params=stops))
    rollouts = finished_rollouts(partial_groups)
    assert len({rollout.seed for rollout in rollouts}) == 36
    kept = {id(sample) for group in partial_groups for sample in group.samples}
    assert {id(sample) for group in complete for sample in group.samples} <= kept, "complete samples are unchanged"
    for rollout in rollouts[:6]:
        own = trainer_logprobs(folder, rollout)[rollout.loss_mask]
        torch.testing.assert_close(rollout.rollout_logprobs[rollout.loss_mask], own, rtol=0, atol=1e-5)


class Echo:
    """Environment that replies with the number of responses so far; the third response ends the episode."""

    def begin(self, prompt: Prompt, seed: int) -> "Echo":
        episode = type(self)()
        episode.responses = []  # type: ignore[attr-defined]
        return episode

    def step(self, response: str) -> Turn:
        self.responses.append(response)  # type: ignore[attr-defined]
        return Turn(None if len(self.responses) == 3 else f"{len(self.responses)}", 0.5)  # type: ignore[attr-defined]


class Broken(Echo):
    """Environment that fails in its first step."""

    def step(self, response: str) -> Turn:
        raise KeyError("no such thing")


TURNS = params(stop_token_ids=tuple(range(0, VOCAB, 5)), max_new_tokens=200)


@pytest.mark.parametrize("budget", [None, 7])
def test_multi_turn_rollouts_keep_their_tokens(
    budget: int | None, collector_of: Callable[..., Collector], folder: Path
) -> None:
    collector, partial_groups = collector_of(), groups()
    changes = {"params": TURNS, "multi_turn": MultiTurn(environment=Echo(), max_turns=8, template="={observation}+")}
    for round_ in range(40):
        partial_groups = collector.collect(
            job(partial_groups, f"round {round_}", max_tokens_per_round=budget, **changes)
        )
        if all(group.is_complete for group in partial_groups):
            break
    tokenizer = load_tokenizer(str(folder))
    observations = [torch.tensor(tokenizer.encode(f"={number}+", add_special_tokens=False)) for number in (1, 2)]
    for rollout in finished_rollouts(partial_groups):
        assert rollout.finish_reason == "stop"
        assert rollout.reward == rollout.reward_parts["coin_flip"] + 1.5
        sampled = rollout.loss_mask
        stop_indices = [i for i in range(len(sampled)) if sampled[i] and int(rollout.token_ids[i]) % 5 == 0]
        assert len(stop_indices) == 3, "one stop token ends each turn, and no response is tokenised again"
        for stop_index, observation in zip(stop_indices[:2], observations, strict=True):
            span = slice(stop_index + 1, stop_index + 1 + len(observation))
            assert rollout.token_ids[span].tolist() == observation.tolist()
            assert not sampled[span].any()
        own = trainer_logprobs(folder, rollout)[sampled]
        torch.testing.assert_close(rollout.rollout_logprobs[sampled], own, rtol=0, atol=1e-5)


def test_multi_turn_rollouts_end_at_the_limit_of_turns_or_tokens(collector_of: Callable[..., Collector]) -> None:
    collector, multi_turn = collector_of(), MultiTurn(environment=Echo(), max_turns=2, template=".{observation}.")
    rollouts = finished_rollouts(collector.collect(job(groups(), params=TURNS, multi_turn=multi_turn)))
    assert {rollout.finish_reason for rollout in rollouts} == {"length"}
    short = params(stop_token_ids=TURNS.stop_token_ids, max_new_tokens=4)
    rollouts = finished_rollouts(collector.collect(job(groups(), "short", params=short, multi_turn=multi_turn)))
    assert max(int(rollout.loss_mask.sum()) for rollout in rollouts) == 4


def test_an_environment_that_raises_fails_its_samples(collector_of: Callable[..., Collector]) -> None:
    collector = collector_of()
    collector._limits = replace(collector._limits, reward_failure_fraction=1.0)
    broken = MultiTurn(environment=Broken(), max_turns=2, template="{observation}")
    rollouts = finished_rollouts(collector.collect(job(groups(), params=TURNS, multi_turn=broken)))
    assert {rollout.status for rollout in rollouts} == {"environment_error"}
    assert "no such thing" in rollouts[0].failure


@pytest.mark.parametrize("deaths", chosen([3, 10], [3]))
def test_results_are_unchanged_when_the_engine_dies_many_times(
    deaths: int, engine_of: EngineOf, engine_name: str, collector_of: Callable[..., Collector], folder: Path
) -> None:
    # SGLang has no seed per sample, so that only its greedy tokens are reproducible
    sampling = replace(ENDLESS, max_new_tokens=60, temperature=0.0 if engine_name == "sglang" else 1.0)
    engine = engine_of(folder, max_num_sequences=6)
    undisturbed = finished_rollouts(collector_of(engine).collect(job(groups(count=40), params=sampling)))
    dying_engine = DyingEngine(engine, engine_name, deaths=deaths)
    collector = collector_of(dying_engine, max_failures=deaths)
    with closing(collector):
        rollouts = finished_rollouts(collector.collect(job(groups(count=40), params=sampling)))
    assert dying_engine.deaths_left == 0
    assert collector.supervisor.num_failures == deaths
    assert len(collector.supervisor.take_notes()) == deaths
    assert [r.token_ids.tolist() for r in rollouts] == [r.token_ids.tolist() for r in undisturbed]
    assert [r.seed for r in rollouts] == [r.seed for r in undisturbed]


def test_an_engine_that_died_between_jobs_is_restarted_before_the_next(
    engine_of: EngineOf, engine_name: str, collector_of: Callable[..., Collector], folder: Path
) -> None:
    engine = engine_of(folder, max_num_sequences=6)
    collector = collector_of(engine, max_failures=1)
    collector.supervisor.restart_dead()
    assert (engine.version, collector.supervisor.num_failures) == (3, 0)
    if engine_name != "sglang":  # the other engines have no process of their own
        return
    kill(engine, engine_name)
    collector.supervisor.restart_dead()
    assert (engine.version, collector.supervisor.num_failures) == (-1, 1)
    engine.load_weights(weights(folder), 3)
    finished_rollouts(collector.collect(job(groups(count=2), "after")))


def test_an_engine_survives_signals_to_all_processes_of_a_rank(
    engine_of: EngineOf, engine_name: str, collector_of: Callable[..., Collector], folder: Path
) -> None:
    """Some schedulers signal all processes to stop a job."""
    engine: Any = engine_of(folder, max_num_sequences=6)
    # the other engines have no processes of their own
    for process in engine._watch._processes if engine_name == "sglang" else ():
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            os.kill(process.pid, number)
    finished_rollouts(collector_of(engine, max_failures=0).collect(job(groups(count=2), "signalled")))


@pytest.mark.parametrize("seconds", [None, 300.0])
def test_a_hanging_engine_is_restarted(
    seconds: float | None,
    engine_of: EngineOf,
    engine_name: str,
    collector_of: Callable[..., Collector],
    folder: Path,
) -> None:
    engine: Any = engine_of(folder, max_num_sequences=6)
    if engine_name != "sglang":  # the other engines have no process that could hang alone
        assert engine.death == ""
        return
    collector = collector_of(engine, max_failures=1)
    engine._watch._timeout_s = 3.0
    stopped = min(engine._watch._processes, key=lambda process: process.pid)  # the scheduler is started first
    os.kill(stopped.pid, signal.SIGSTOP)
    finished_rollouts(collector.collect(job(groups(count=2), f"hanging {seconds}", max_seconds=seconds)))
    assert re.search(r"gave no answer for \d+ s \(rollout\.engine_timeout_s\)", collector.supervisor.take_notes()[0])


def test_partial_groups_are_serialized_exactly(collector_of: Callable[..., Collector], tmp_path: Path) -> None:
    prompt = Prompt(prompt_id="x", token_ids=torch.tensor([3, 4]), text="a\u2028b\x85", answer=None)
    partial_groups = [begin_group(prompt, [1, 2]), *groups(count=1)]
    partial_groups = collector_of().collect(job(partial_groups, "written", max_tokens_per_round=7))
    partial_groups = [partial_groups[0], *collector_of().collect(job(partial_groups[1:], "whole"))]
    write_lines(tmp_path / "in_flight.jsonl", [group_to_json(group) for group in partial_groups])
    restored = [group_from_json(line) for line in read_lines(tmp_path / "in_flight.jsonl")]
    assert [group_to_json(group) for group in restored] == [group_to_json(group) for group in partial_groups]
    assert restored[0].prompt.text == prompt.text
    assert not restored[0].is_complete
    assert restored[1].is_complete
    assert all(isinstance(s, PartialRollout) and s.num_sampled == 7 for s in restored[0].samples)
    assert restored[0].restart_stale(4).samples[0] == PartialRollout(seed=1)
    assert restored[0].restart_stale(3) == restored[0]


def test_too_many_engine_failures_end_the_run(
    engine_of: EngineOf, engine_name: str, collector_of: Callable[..., Collector], folder: Path
) -> None:
    engine = engine_of(folder, max_num_sequences=6)
    collector = collector_of(DyingEngine(engine, engine_name, deaths=3), max_failures=1)
    with pytest.raises(EngineDied, match=r"died 2 times.*rollout\.max_engine_failures=1"):
        collector.collect(job(groups()))
    engine.__dict__.pop("_step", None)  # type: ignore[attr-defined]
    engine.restart()
