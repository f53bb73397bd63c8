"""vLLM in the trainer's own processes; every rank of an engine runs the same scheduler over its shard.

Written against vLLM 0.20 to 0.32. What differs between a machine with GPUs and one without is in ``_arguments``.
"""

import gc
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_rl.errors import EngineError
from megatron_rl.models import layout_table
from megatron_rl.rollout.engine import EngineSetup, Finished, Request
from megatron_rl.rollout.engines.admission import Admission
from megatron_rl.rollout.engines.hosting import DTYPES, finish_reason, surroundings
from megatron_rl.rollout.engines.loading import ExpectedTensors
from megatron_rl.types import Completion, SamplingParams
from megatron_rl.weights.layout import hf_shapes


class VllmEngine:
    """This rank's part of a vLLM engine."""

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
        self._version = -1
        self._count = 0
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
        with surroundings(_environment(setup, identity)):
            try:
                from vllm import LLM
            except ImportError as error:
                raise EngineError(
                    f"rollout.engine=vllm, but vLLM cannot be imported: {error}. Install it as docs/engines.md says."
                ) from error
            _keep_default_group()
            self._llm = LLM(**arguments)

    @property
    def version(self) -> int:
        return self._version

    def load_weights(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        self._version = -1  # half-loaded weights have no version
        arguments = {"weights_iterator": self._expected.watch(tensors)}
        self._llm.collective_rpc("reload_weights", kwargs=arguments)
        self._expected.check_complete()
        if self._setup.device.type == "cpu":
            self._llm.collective_rpc(_pack_again)
        self._llm.reset_prefix_cache()  # it would answer from the weights before
        self._version = version

    def generate(self, requests: Iterator[Request], params: SamplingParams, *, max_requests: int) -> Iterator[Finished]:
        admission = Admission(requests, params, self._setup, version=self._version, max_requests=max_requests)
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
        tokens = list(output.token_ids)
        logprobs = [found[token].logprob for token, found in zip(tokens, output.logprobs, strict=True)]
        return Completion(
            token_ids=torch.tensor(tokens, dtype=torch.int64),
            logprobs=torch.tensor(logprobs, dtype=torch.float32),
            finish_reason=finish_reason(output.finish_reason),
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


def _environment(setup: EngineSetup, identity: str) -> dict[str, str]:
    """Variables that vLLM reads while it starts."""
    values = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_DIST_IDENT": identity,
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


def _pack_again(worker: Any) -> None:
    """What vLLM packs for CPUs when it first loads a model, and not when it reloads: experts, and a tied head."""
    model = worker.model_runner.model
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(module)
    if model.config.tie_word_embeddings:
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
