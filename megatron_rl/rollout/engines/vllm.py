"""The vLLM engine in the trainer's own processes; every rank of an engine runs the same scheduler over its shard.

Written against vLLM 0.20 to 0.32. ``_arguments`` has the arguments that differ between GPUs and CPUs.
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
from megatron_rl.rollout.engines.hosting import DTYPES, finish_reason, temporary_environment
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
            setup: arguments of every engine; its options are further arguments of ``vllm.LLM``.
            identity: identifier of the run; it keeps the shared memory of several runs on one machine apart.

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
            "load_format": "dummy",  # the first push sets the weights
            "skip_tokenizer_init": True,
            "dtype": DTYPES[setup.dtype],
            "max_model_len": setup.max_model_len,
            "max_num_seqs": setup.max_num_sequences,
            "tensor_parallel_size": setup.place.tp_size,
            "distributed_executor_backend": "external_launcher",
            "seed": setup.place.index,
            "logprobs_mode": "processed_logprobs",  # log-probabilities of the distribution that is sampled from
            "disable_log_stats": True,
            **_arguments(setup.device, setup.max_model_len),
            **setup.options,
        }
        with temporary_environment(_environment(setup)):
            try:
                from vllm import LLM
            except ImportError as error:
                raise EngineError(
                    f"rollout.engine=vllm, but vLLM cannot be imported: {error}. Install it as in docs/engines.md."
                ) from error
            _keep_default_group()
            if setup.device.type == "cpu":
                _name_shared_memory(self._identity)
            self._llm = LLM(**arguments)
        # vLLM's own sleep mode needs a GPU
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
        self._llm.reset_prefix_cache()  # the prefix cache belongs to the previous weights
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
        running: dict[str, _Sample] = {}
        try:
            while True:
                if admission.should_abort():
                    if self.place.is_leader:
                        yield from [self._finished(sample, "abort") for sample in running.values()]
                    return
                for request in admission.pull():
                    running |= self._add(request, params, streams=should_stop is not None)
                if admission.is_idle:
                    return
                for output in self._run_step(engine):
                    sample = running[output.request_id]
                    sample.append(output.outputs[0])
                    if output.finished:
                        del running[output.request_id]
                        admission.finish(sample.key)
                        if self.place.is_leader:
                            yield self._finished(sample, output.outputs[0].finish_reason)
        finally:
            if running:
                engine.abort_request(list(running))

    def loglikelihood(self, continuations: Sequence[Continuation]) -> list[Tensor]:
        from vllm import SamplingParams as VllmParams
        from vllm import TokensPrompt

        check_continuations(continuations, self._setup, version=self._version)
        engine = self._llm.llm_engine
        vllm_params = VllmParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        requests: dict[str, Continuation] = {}
        for continuation in continuations:
            name = self._new_request_id()
            prompt = TokensPrompt(prompt_token_ids=continuation.token_ids.tolist())
            engine.add_request(name, prompt, vllm_params)
            requests[name] = continuation
        results: dict[str, Tensor] = {}
        while len(results) < len(requests):
            for output in self._run_step(engine):
                if output.finished:
                    results[output.request_id] = _logprobs_of(requests[output.request_id], output.prompt_logprobs)
        return [results[name] for name in requests] if self.place.is_leader else []

    def sleep(self) -> None:
        self._version = -1
        if self._setup.device.type == "cuda" and not self._asleep:
            self._llm.sleep(level=2)  # level 2 keeps no copy of the weights, which are pushed again
        self._asleep = {"weights", "kv_cache"}
        for storages in self._on_host.values():
            storages.release()

    def wake(self, part: EnginePart) -> None:
        if part not in self._asleep:
            return
        self._asleep.remove(part)
        if self._setup.device.type == "cuda":
            self._llm.wake_up(tags=[part])
        else:
            self._on_host[part].reallocate()

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
        gc.collect()  # vLLM's objects are in reference cycles

    def _run_step(self, engine: Any) -> list[Any]:
        """Run one step of the scheduler and return its outputs.

        Raises:
            EngineDied: the step failed, so that the engine is in an unknown state.
        """
        try:
            outputs: list[Any] = engine.step()
        except Exception as error:  # any exception: vLLM's state is unknown after it
            self._death = f"vLLM failed in a step: {error!r}"
            raise EngineDied(self._death) from error
        return outputs

    def _add(self, request: Request, params: SamplingParams, *, streams: bool) -> dict[str, "_Sample"]:
        """Add every sample as a vLLM request of its own: vLLM would seed samples of one request seed, seed + 1, ….

        Args:
            streams: let vLLM report tokens as they are sampled, so that an aborted sample keeps its tokens.

        Returns:
            The samples by vLLM's request id.
        """
        from vllm import SamplingParams as VllmParams
        from vllm import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        samples = {}
        for sample, seed in enumerate(request.seeds):
            name = self._new_request_id()
            vllm_params = VllmParams(
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k,
                seed=seed,
                max_tokens=request.limit(params),
                stop_token_ids=list(params.stop_token_ids),
                ignore_eos=True,  # stop_token_ids is complete
                logprobs=0 if params.logprobs else None,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA if streams else RequestOutputKind.FINAL_ONLY,
            )
            prompt = TokensPrompt(prompt_token_ids=request.token_ids.tolist())
            self._llm.llm_engine.add_request(name, prompt, vllm_params)
            samples[name] = _Sample(key=request.key, sample=sample)
        return samples

    def _new_request_id(self) -> str:
        """Return a new vLLM request id."""
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
    """Tokens of one sample so far."""

    key: int
    sample: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def append(self, output: Any) -> None:
        """Append the new tokens of a vLLM output; its last output may have none."""
        tokens = list(output.token_ids)
        self.tokens += tokens
        # log-probabilities are absent if none were requested
        logprobs = output.logprobs or [None] * len(tokens)
        self.logprobs += [
            math.nan if by_token is None else by_token[token].logprob
            for token, by_token in zip(tokens, logprobs, strict=True)
        ]


def _logprobs_of(continuation: Continuation, prompt_logprobs: Sequence[Any]) -> Tensor:
    """Return [T - start] float32, the continuation's part of vLLM's prompt log-probabilities."""
    tokens = continuation.token_ids.tolist()[continuation.start :]
    entries = zip(tokens, prompt_logprobs[continuation.start :], strict=True)
    return torch.tensor([by_token[token].logprob for token, by_token in entries])


def _arguments(device: torch.device, max_model_len: int) -> dict[str, Any]:
    """Return the arguments of ``vllm.LLM`` that depend on the device."""
    if device.type == "cuda":
        return {"enable_sleep_mode": True}
    # a seed together with chunked prefill crashes on CPUs, so a whole prompt must fit into a step
    return {
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(8192, max_model_len),
    }


def _environment(setup: EngineSetup) -> dict[str, str]:
    """Return the environment variables that vLLM reads while it starts."""
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
    """Patch vLLM so that an engine that ends does not destroy torch's default group, which is the trainer's."""
    from vllm.distributed.parallel_state import destroy_model_parallel
    from vllm.v1.engine import core

    core.cleanup_dist_env_and_memory = destroy_model_parallel


def _name_shared_memory(identity: str) -> None:
    """Patch the names of vLLM's shared memory on CPUs, so that they contain the identity of the run.

    Under an external launcher vLLM uses the same names in every run on a machine. A second run would open the memory
    of the first, also after the first was killed.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    def name(communicator: Any) -> str:
        return "-".join([identity, communicator.unique_name, *map(str, communicator.ranks)])

    _CPUSHMDistributed.make_group_name = staticmethod(name)


def _storages(worker: Any) -> dict[EnginePart, Storages]:
    """Return the tensors of a vLLM worker on CPUs."""
    runner = worker.model_runner
    return {"weights": Storages(runner.model.parameters()), "kv_cache": Storages(runner.kv_caches)}


def _memory(worker: Any) -> dict[EnginePart, int]:
    """Return the bytes that a vLLM worker on a GPU holds; sleeping parts have addresses, but no memory."""
    return {part: storages.num_bytes for part, storages in _storages(worker).items()}


def _pack_again(worker: Any) -> None:
    """Pack experts and a tied head for CPUs, which vLLM does on the first load of a model, but not on reloads."""
    model = worker.model_runner.model
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(module)
    if model.config.tie_word_embeddings:
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
