"""vLLM in the trainer's own processes; every rank of an engine runs the same scheduler over its shard.

Written against vLLM 0.20 to 0.32. What differs between a machine with GPUs and one without is in ``_arguments``.
"""

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_rl.errors import EngineError
from megatron_rl.models import ModelSpec, layout_table
from megatron_rl.rollout.engine import EnginePlace, Finished, Request
from megatron_rl.rollout.engines.admission import Admission
from megatron_rl.rollout.engines.loading import ExpectedTensors
from megatron_rl.types import Completion, FinishReason, SamplingParams
from megatron_rl.weights.layout import hf_shapes

FINISH_REASONS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class VllmEngine:
    """This rank's part of a vLLM engine."""

    def __init__(
        self,
        folder: str,
        spec: ModelSpec,
        *,
        place: EnginePlace,
        device: torch.device,
        dtype: torch.dtype,
        max_num_sequences: int,
        max_model_len: int,
        rank: int,
        local_rank: int,
        identity: str,
        options: Mapping[str, Any],
    ) -> None:
        """Start the engine; collective over all ranks, which must have joined torch's default group.

        Args:
            folder: config.json of the model; its weights are not read.
            identity: of this run, by which several on one machine keep their shared memory apart.
            options: further arguments of ``vllm.LLM``.

        Raises:
            EngineError: vLLM is not installed, or does not start.
        """
        self.place = place
        self._spec = spec
        self._max_num_sequences = max_num_sequences
        self._expected = ExpectedTensors(hf_shapes(layout_table(spec, 1)))
        self._version = -1
        self._count = 0
        arguments = {
            "model": folder,
            "load_format": "dummy",  # the first push brings the weights
            "skip_tokenizer_init": True,
            "dtype": DTYPES[dtype],
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_sequences,
            "tensor_parallel_size": place.tp_size,
            "distributed_executor_backend": "external_launcher",
            "seed": place.index,
            "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
            "disable_log_stats": True,
            **_arguments(device, max_model_len),
            **options,
        }
        with _surroundings(_environment(device, rank, local_rank, identity)):
            try:
                from vllm import LLM
            except ImportError as error:
                raise EngineError(
                    f"rollout.engine=vllm, but vLLM cannot be imported: {error}. Install it as docs/engines.md says."
                ) from error
            _keep_default_group()
            self._llm = LLM(**arguments)
        self._is_on_cpu = device.type == "cpu"

    @property
    def version(self) -> int:
        return self._version

    def load_weights(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        self._version = -1  # half-loaded weights have no version
        arguments = {"weights_iterator": self._expected.watch(tensors)}
        self._llm.collective_rpc("reload_weights", kwargs=arguments)
        self._expected.check_complete()
        if self._is_on_cpu:
            self._llm.collective_rpc(_pack_again)
        self._llm.reset_prefix_cache()  # it would answer from the weights before
        self._version = version

    def generate(self, requests: Iterator[Request], params: SamplingParams, *, max_requests: int) -> Iterator[Finished]:
        if self._version < 0:
            raise EngineError("the vLLM engine has no weights yet: push them before generating.")
        admission = Admission(
            requests,
            params,
            self._spec,
            self.place,
            max_requests=max_requests,
            max_num_sequences=self._max_num_sequences,
        )
        engine = self._llm.llm_engine
        owners: dict[str, tuple[int, int]] = {}
        try:
            while True:
                for request in admission.pull():
                    owners |= self._add(request, params)
                if admission.is_idle:
                    return
                for output in engine.step():
                    if not output.finished:
                        continue
                    key, sample = owners.pop(output.request_id)
                    admission.finish(key)
                    if self.place.is_leader:
                        yield Finished(key=key, sample=sample, completion=self._completion(output.outputs[0]))
        finally:
            if owners:
                engine.abort_request(list(owners))

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()  # its parts refer to each other

    def _add(self, request: Request, params: SamplingParams) -> dict[str, tuple[int, int]]:
        """Begin every sample as a request of its own: vLLM would seed those of one request seed, seed + 1, ….

        Returns:
            vLLM's name -> (key, sample).
        """
        from vllm import SamplingParams as VllmParams
        from vllm import TokensPrompt

        owners = {}
        for sample, seed in enumerate(request.seeds):
            name = str(self._count)
            self._count += 1
            wanted = VllmParams(
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k,
                seed=seed,
                max_tokens=params.max_new_tokens,
                stop_token_ids=list(params.stop_token_ids),
                ignore_eos=True,  # the stop tokens are all given
                logprobs=0,
                detokenize=False,
            )
            self._llm.llm_engine.add_request(name, TokensPrompt(prompt_token_ids=request.token_ids.tolist()), wanted)
            owners[name] = (request.key, sample)
        return owners

    def _completion(self, output: Any) -> Completion:
        if output.finish_reason not in FINISH_REASONS:
            raise EngineError(f"vLLM ended a request with {output.finish_reason!r}, expected {list(FINISH_REASONS)}.")
        tokens = list(output.token_ids)
        logprobs = [found[token].logprob for token, found in zip(tokens, output.logprobs, strict=True)]
        return Completion(
            token_ids=torch.tensor(tokens, dtype=torch.int64),
            logprobs=torch.tensor(logprobs, dtype=torch.float32),
            finish_reason=FINISH_REASONS[output.finish_reason],
            policy_version=self._version,
        )


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


def _environment(device: torch.device, rank: int, local_rank: int, identity: str) -> dict[str, str]:
    """Variables that vLLM reads while it starts."""
    values = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_DIST_IDENT": identity,
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
    }
    if device.type == "cpu":
        values["TORCHDYNAMO_DISABLE"] = "1"
    defaults = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
    defaults |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_WORLD_SIZE": "1"}
    return values | {name: value for name, value in defaults.items() if name not in os.environ}


@contextmanager
def _surroundings(environment: Mapping[str, str]) -> Iterator[None]:
    """Variables for the time of the start; what vLLM changes in the process is put back."""
    before, random_state, set_num_threads = dict(os.environ), torch.get_rng_state(), torch.set_num_threads
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        torch.set_rng_state(random_state)
        torch.set_num_threads = set_num_threads


def _keep_default_group() -> None:
    """When an engine ends, vLLM destroys torch's default group as well, which here is the trainer's."""
    from vllm.distributed.parallel_state import destroy_model_parallel
    from vllm.v1.engine import core

    core.cleanup_dist_env_and_memory = destroy_model_parallel


def _pack_again(worker: Any) -> None:
    """What vLLM packs for CPUs when it first loads a model, and not when it reloads: experts, and a tied head."""
    model = worker.model_runner.model
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(module)
    if model.config.tie_word_embeddings:
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
