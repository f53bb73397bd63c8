"""vLLM in the trainer's own processes; every rank of an engine runs the same scheduler over its shard.

Written against vLLM 0.20 to 0.32. What differs between a machine with GPUs and one without is in ``_arguments``.
"""

import gc
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_rl.errors import EngineDied, EngineError
from megatron_rl.models import layout_table
from megatron_rl.rollout.engines.admission import Admission
from megatron_rl.rollout.engines.base import (
    Continuation,
    EnginePart,
    EngineSetup,
    Finished,
    Request,
    check_continuations,
)
from megatron_rl.rollout.engines.hosting import DTYPES, finish_reason, surroundings
from megatron_rl.rollout.engines.loading import ExpectedTensors
from megatron_rl.rollout.engines.storages import Storages
from megatron_rl.types import Completion, SamplingParams
from megatron_rl.weights.layout import hf_shapes


class VllmEngine:
    """This rank's part of a vLLM engine."""

    starts_together = True

    def __init__(self, setup: EngineSetup, *, identity: str) -> None:
        """Start the engine; collective over all ranks, which must have joined torch's default group.

        Args:
            setup: its options are further arguments of ``vllm.LLM``.
            identity: of this run, by which several on one machine keep their shared memory apart.

        Raises:
            EngineError: vLLM is not installed, or does not start.
        """
        self.place = setup.place
        self._setup = setup
        self._expected = ExpectedTensors(hf_shapes(layout_table(setup.spec, 1)))
        self._identity = identity
        self._version = -1
        self._count = 0
        self._start()

    def _start(self) -> None:
        setup = self._setup
        self._asleep: set[EnginePart] = set()
        self._death = ""
        arguments = {
            "model": setup.folder,
            "load_format": "dummy",  # the first push brings the weights
            "skip_tokenizer_init": True,
            "dtype": DTYPES[setup.dtype],
            "max_model_len": setup.max_model_len,
            "max_num_seqs": setup.max_num_sequences,
            "tensor_parallel_size": setup.place.tp_size,
            "distributed_executor_backend": "external_launcher",
            "seed": setup.place.index,
            "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
            "disable_log_stats": True,
            **_arguments(setup.device, setup.max_model_len),
            **setup.options,
        }
        with surroundings(_environment(setup)):
            try:
                from vllm import LLM
            except ImportError as error:
                raise EngineError(
                    f"rollout.engine=vllm, but vLLM cannot be imported: {error}. Install it as docs/engines.md says."
                ) from error
            _keep_default_group()
            if setup.device.type == "cpu":
                _name_shared_memory(self._identity)
            self._llm = LLM(**arguments)
        # vLLM's own sleep is for GPUs
        self._on_host: Mapping[EnginePart, Storages] = (
            self._llm.collective_rpc(_storages)[0] if setup.device.type == "cpu" else {}
        )

    @property
    def version(self) -> int:
        return self._version

    @property
    def death(self) -> str:
        return self._death

    def load_weights(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        self._version = -1  # half-loaded weights have no version
        arguments = {"weights_iterator": self._expected.watch(tensors)}
        self._llm.collective_rpc("reload_weights", kwargs=arguments)
        self._expected.check_complete()
        if self._setup.device.type == "cpu":
            self._llm.collective_rpc(_pack_again)
        self._llm.reset_prefix_cache()  # it would answer from the weights before
        self._version = version

    def generate(
        self,
        requests: Iterator[Request | None],
        params: SamplingParams,
        *,
        max_requests: int,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[Finished]:
        admission = Admission(
            requests, params, self._setup, version=self._version, max_requests=max_requests, should_stop=should_stop
        )
        engine = self._llm.llm_engine
        in_work: dict[str, _Sample] = {}
        try:
            while True:
                if admission.is_over():
                    if self.place.is_leader:
                        yield from [self._finished(sample, "abort") for sample in in_work.values()]
                    return
                for request in admission.pull():
                    in_work |= self._add(request, params, in_parts=should_stop is not None)
                if admission.is_idle:
                    return
                for output in self._stepped(engine):
                    sample = in_work[output.request_id]
                    sample.take(output.outputs[0])
                    if output.finished:
                        del in_work[output.request_id]
                        admission.finish(sample.key)
                        if self.place.is_leader:
                            yield self._finished(sample, output.outputs[0].finish_reason)
        finally:
            if in_work:
                engine.abort_request(list(in_work))

    def score(self, continuations: Sequence[Continuation]) -> list[Tensor]:
        from vllm import SamplingParams as VllmParams
        from vllm import TokensPrompt

        check_continuations(continuations, self._setup, version=self._version)
        engine = self._llm.llm_engine
        wanted = VllmParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        in_work: dict[str, Continuation] = {}
        for one in continuations:
            name = self._new_name()
            engine.add_request(name, TokensPrompt(prompt_token_ids=one.token_ids.tolist()), wanted)
            in_work[name] = one
        found: dict[str, Tensor] = {}
        while len(found) < len(in_work):
            for output in self._stepped(engine):
                if output.finished:
                    found[output.request_id] = _logprobs_of(in_work[output.request_id], output.prompt_logprobs)
        return [found[name] for name in in_work] if self.place.is_leader else []

    def sleep(self) -> None:
        self._version = -1
        if self._setup.device.type == "cuda" and not self._asleep:
            self._llm.sleep(level=2)  # weights are pushed anew, so they need no copy
        self._asleep = {"weights", "kv_cache"}
        for storages in self._on_host.values():
            storages.give_up()

    def wake(self, part: EnginePart) -> None:
        if part not in self._asleep:
            return
        self._asleep.remove(part)
        if self._setup.device.type == "cuda":
            self._llm.wake_up(tags=[part])
        else:
            self._on_host[part].take_again()

    def memory(self) -> Mapping[EnginePart, int]:
        return (
            self._llm.collective_rpc(_memory)[0]
            if not self._on_host
            else {part: storages.num_bytes for part, storages in self._on_host.items()}
        )

    def restart(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        self._version = -1
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        self._on_host = {}
        gc.collect()  # its parts refer to each other

    def _stepped(self, engine: Any) -> list[Any]:
        """One step of the scheduler.

        Raises:
            EngineDied: it failed; what it holds is in an unknown state.
        """
        try:
            outputs: list[Any] = engine.step()
        except Exception as error:  # of any kind: vLLM's own state is then unknown
            self._death = f"vLLM failed in a step: {error!r}"
            raise EngineDied(self._death) from error
        return outputs

    def _add(self, request: Request, params: SamplingParams, *, in_parts: bool) -> dict[str, "_Sample"]:
        """Begin every sample as a request of its own: vLLM would seed those of one request seed, seed + 1, ….

        Args:
            in_parts: let vLLM report tokens as they come, so that a sample can be given up without losing them.

        Returns:
            The samples under vLLM's names.
        """
        from vllm import SamplingParams as VllmParams
        from vllm import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        samples = {}
        for sample, seed in enumerate(request.seeds):
            name = self._new_name()
            wanted = VllmParams(
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k,
                seed=seed,
                max_tokens=request.limit(params),
                stop_token_ids=list(params.stop_token_ids),
                ignore_eos=True,  # the stop tokens are all given
                logprobs=0 if params.logprobs else None,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA if in_parts else RequestOutputKind.FINAL_ONLY,
            )
            self._llm.llm_engine.add_request(name, TokensPrompt(prompt_token_ids=request.token_ids.tolist()), wanted)
            samples[name] = _Sample(key=request.key, sample=sample)
        return samples

    def _new_name(self) -> str:
        """Of a request, as vLLM knows it."""
        self._count += 1
        return str(self._count)

    def _finished(self, sample: "_Sample", reason: str) -> Finished:
        completion = Completion(
            token_ids=torch.tensor(sample.tokens, dtype=torch.int64),
            logprobs=torch.tensor(sample.logprobs, dtype=torch.float32),
            finish_reason=finish_reason(reason),
            policy_version=self._version,
        )
        return Finished(key=sample.key, sample=sample.sample, completion=completion)


@dataclass(kw_only=True)
class _Sample:
    """What has come of one sample."""

    key: int
    sample: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def take(self, output: Any) -> None:
        """Further tokens; with those of the end vLLM may send none."""
        tokens = list(output.token_ids)
        self.tokens += tokens
        # none were asked for where there are none
        logprobs = output.logprobs or [None] * len(tokens)
        self.logprobs += [
            math.nan if found is None else found[token].logprob for token, found in zip(tokens, logprobs, strict=True)
        ]


def _logprobs_of(asked: Continuation, found: Sequence[Any]) -> Tensor:
    """[T - start] float32 from vLLM's log-probabilities of a whole prompt."""
    tokens = asked.token_ids.tolist()[asked.start :]
    return torch.tensor([one[token].logprob for token, one in zip(tokens, found[asked.start :], strict=True)])


def _arguments(device: torch.device, max_model_len: int) -> dict[str, Any]:
    """What depends on the device."""
    if device.type == "cuda":
        return {"enable_sleep_mode": True}
    # a seed together with a chunked prefill crashes on CPUs, so a prompt must fit a step
    return {
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(8192, max_model_len),
    }


def _environment(setup: EngineSetup) -> dict[str, str]:
    """Variables that vLLM reads while it starts."""
    values = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "RANK": str(setup.place.rank),
        "LOCAL_RANK": str(setup.local_rank),
    }
    if setup.device.type == "cpu":
        values["TORCHDYNAMO_DISABLE"] = "1"
    defaults = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
    defaults |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_WORLD_SIZE": "1"}
    return values | {name: value for name, value in defaults.items() if name not in os.environ}


def _keep_default_group() -> None:
    """When an engine ends, vLLM destroys torch's default group as well, which here is the trainer's."""
    from vllm.distributed.parallel_state import destroy_model_parallel
    from vllm.v1.engine import core

    core.cleanup_dist_env_and_memory = destroy_model_parallel


def _name_shared_memory(identity: str) -> None:
    """Under an external launcher vLLM gives the ranks' shared memory on CPUs the same name in every run of a machine.

    A second run would meet the first one's, and so would one after another that was killed.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    def name(communicator: Any) -> str:
        return "-".join([identity, communicator.unique_name, *map(str, communicator.ranks)])

    _CPUSHMDistributed.make_group_name = staticmethod(name)


def _storages(worker: Any) -> dict[EnginePart, Storages]:
    """What a worker on the host holds."""
    runner = worker.model_runner
    return {"weights": Storages(runner.model.parameters()), "kv_cache": Storages(runner.kv_caches)}


def _memory(worker: Any) -> dict[EnginePart, int]:
    """What a worker on a GPU holds; what sleeps has addresses, but no memory."""
    return {part: storages.num_bytes for part, storages in _storages(worker).items()}


def _pack_again(worker: Any) -> None:
    """What vLLM packs for CPUs when it first loads a model, and not when it reloads: experts, and a tied head."""
    model = worker.model_runner.model
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(module)
    if model.config.tie_word_embeddings:
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
