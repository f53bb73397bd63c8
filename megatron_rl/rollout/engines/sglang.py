"""The SGLang engine; its schedulers are child processes of the first rank of each engine.

Written against SGLang 0.5.11 to 0.5.23. Every rank provides the weights for the child with its TP rank.
"""

import asyncio
import atexit
import base64
import json
import math
import os
import pickle
import signal
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from megatron_rl.distributed.collectives import gather_over
from megatron_rl.errors import EngineDied, EngineError, WeightSyncError
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
from megatron_rl.rollout.engines.children import ChildWatch, preserve_signal_handlers
from megatron_rl.rollout.engines.hosting import DTYPES, finish_reason, temporary_environment
from megatron_rl.rollout.engines.loading import ExpectedTensors
from megatron_rl.types import Completion, SamplingParams
from megatron_rl.weights.layout import hf_shapes, layer_of

# bytes after which a bundle of whole layers is sent to the children
BUNDLE_BYTES = 2**28
# SGLang ends a sequence two tokens before the end of its context, and rejects prompts that end in the last six tokens
SPARE_TOKENS = 8
# seconds between two checks whether to stop
STOP_POLL_S = 0.05
# with these set, the children would try to join the trainer's world
LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_",
    "TORCHELASTIC",
    "GROUP_",
    "ROLE_",
)


class SglangEngine:
    """This rank's part of an SGLang engine; the first rank of each engine owns its processes."""

    starts_together = False

    def __init__(self, setup: EngineSetup, *, seed: int) -> None:
        """Start the engine.

        Args:
            setup: arguments of every engine; its options are further arguments of ``sglang.Engine``.
            seed: seed of this engine's sampling, which has one random state for all requests.

        Raises:
            EngineError: SGLang is not installed, does not start, or cannot compute the model.
        """
        window = setup.spec.sliding_window
        if window is not None and window.size < setup.max_model_len:
            raise EngineError(
                f"SGLang attends to all tokens, but this model attends to the last {window.size}, and sequences may "
                f"have {setup.max_model_len} tokens. Use rollout.engine=vllm, or shorten prompts and responses to the "
                "window."
            )
        self.place = setup.place
        self._setup = setup
        self._expected = ExpectedTensors(hf_shapes(layout_table(setup.spec, 1)))
        self._version = -1
        self._seed = seed
        self._engine: Any = None
        self._watch: Any = None
        self._asleep: set[EnginePart] = set()
        if self.place.is_leader:
            self._start()

    def _start(self) -> None:
        with TemporaryDirectory() as folder:
            _write_config(Path(self._setup.folder), Path(folder), self._setup.max_model_len + SPARE_TOKENS)
            self._start_from(folder)

    def _start_from(self, folder: str) -> None:
        setup = self._setup
        self._asleep = set()
        arguments = {
            "model_path": folder,
            "load_format": "dummy",  # the first push sets the weights
            "skip_tokenizer_init": True,
            "dtype": DTYPES[setup.dtype],
            "context_length": setup.max_model_len + SPARE_TOKENS,
            "max_running_requests": setup.max_num_sequences,
            "tp_size": self.place.tp_size,
            "base_gpu_id": setup.local_rank if setup.device.type == "cuda" else 0,
            "random_seed": self._seed,
            "log_level": "error",
            "sleep_on_idle": True,  # a scheduler that polls would occupy a core during training
            "custom_sigquit_handler": _ignore,  # a child that fails sends SIGQUIT, which would end the trainer
            **_arguments(setup.device, setup.max_num_sequences * (setup.max_model_len + SPARE_TOKENS)),
            **setup.options,
        }
        with temporary_environment(_environment(setup), LAUNCHER_VARIABLES):
            try:
                import sglang
            except ImportError as error:
                raise EngineError(
                    f"rollout.engine=sglang, but SGLang cannot be imported: {error}. Install it as in docs/engines.md."
                ) from error
            before = set(active_children())
            with preserve_signal_handlers():
                try:
                    self._engine = sglang.Engine(**arguments)
                except RuntimeError as error:
                    raise EngineError(f"SGLang failed to start: {error}") from error
                manager, loop = self._engine.tokenizer_manager, self._engine.loop
                loop.run_until_complete(_start_handle_loop(manager))
                for number in (signal.SIGTERM, signal.SIGQUIT):
                    loop.remove_signal_handler(number)
            signal.signal(signal.SIGQUIT, _ignore)
        # SGLang's own watchdog ends this process when a child exits, and its shutdown ends all children of this
        # process, including reward workers and torch's memory manager
        manager._subprocess_watchdog.stop()
        atexit.unregister(self._engine.shutdown)
        self._watch = ChildWatch(loop, set(active_children()) - before, setup.timeout_s)

    @property
    def version(self) -> int:
        return self._version

    @property
    def death(self) -> str:
        return "" if self._watch is None else self._watch.lost

    def load_weights(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        self._version = -1  # half-loaded weights have no version
        self._call_engine("begin_weight_update")
        try:
            for bundle in _bundles(self._expected.watch(tensors)):
                self._send(bundle)
            self._expected.check_complete()
        finally:  # also after a failed push: otherwise the next one could not begin
            self._call_engine("end_weight_update")
        self._call_engine("flush_cache")  # the prefix cache belongs to the previous weights
        self._version = version

    def generate(
        self,
        requests: Iterator[Request | None],
        params: SamplingParams,
        *,
        max_requests: int,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[Finished]:
        if params.logprobs and (params.top_p < 1 or params.top_k > 0):
            raise EngineError(
                f"SGLang reports log-probabilities of the full distribution, but top_p={params.top_p} and "
                f"top_k={params.top_k} sample from a truncated one. Set rollout.top_p=1 and rollout.top_k=0."
            )
        if self._engine is None:
            return
        # the other ranks take no part in generation, so the leader must not broadcast to them
        leader_setup = replace(self._setup, place=replace(self.place, group=None))
        admission = Admission(
            requests, params, leader_setup, version=self._version, max_requests=max_requests, should_stop=should_stop
        )
        is_aborting, has_answer = False, True
        loop = self._engine.loop
        owners: dict[asyncio.Task[Any], tuple[int, int]] = {}
        try:
            while True:
                is_aborting = is_aborting or admission.should_abort()
                for request in () if is_aborting else admission.pull():
                    for sample in range(len(request.seeds)):
                        owners[loop.create_task(self._sample(request, params))] = (request.key, sample)
                if not owners:
                    return
                if is_aborting:  # in every iteration, because an abort misses requests that have not reached SGLang yet
                    self._engine.tokenizer_manager.abort_request(abort_all=True)
                with self._watch.waiting(keep_timer=not has_answer):
                    done = loop.run_until_complete(_wait_for_any(owners, STOP_POLL_S))
                has_answer = bool(done)
                for task in done:
                    key, sample = owners.pop(task)
                    admission.finish(key)
                    yield Finished(key=key, sample=sample, completion=self._completion(task.result()))
        finally:
            self._abort(owners)

    def loglikelihood(self, continuations: Sequence[Continuation]) -> list[Tensor]:
        check_continuations(continuations, self._setup, version=self._version)
        if self._engine is None:
            return []
        tasks = [self._engine.loop.create_task(self._loglikelihood(continuation)) for continuation in continuations]
        pending = set(tasks)
        try:
            while pending:
                with self._watch.waiting():
                    pending -= self._engine.loop.run_until_complete(_wait_for_any(pending, None))
        finally:
            self._abort(pending)
        return [task.result() for task in tasks]

    def sleep(self) -> None:
        self._version = -1
        # on CPUs SGLang keeps its memory
        if self._engine is not None and self._setup.device.type == "cuda" and not self._asleep:
            self._asleep = {"weights", "kv_cache"}
            with self._watch.waiting():
                self._engine.release_memory_occupation(["kv_cache", "weights"])

    def wake(self, part: EnginePart) -> None:
        if part in self._asleep:
            self._asleep.remove(part)
            with self._watch.waiting():
                self._engine.resume_memory_occupation([part])

    def memory(self) -> Mapping[EnginePart, int]:
        return {}  # the memory belongs to child processes

    def restart(self) -> None:
        self.close()
        if self.place.is_leader:
            self._start()

    def close(self) -> None:
        self._version = -1
        if self._watch is not None:
            self._watch.kill()
        self._watch = self._engine = None

    def _abort(self, tasks: Collection[asyncio.Task[Any]]) -> None:
        """Abort the requests of tasks that have not ended, and wait for the tasks."""
        if not tasks:
            return
        if not self._watch.lost:
            self._engine.tokenizer_manager.abort_request(abort_all=True)
            with suppress(EngineDied), self._watch.waiting():  # the next use of the engine raises it
                self._engine.loop.run_until_complete(asyncio.wait(tasks))
        if self._watch.lost:
            self._watch.abandon(tasks)

    async def _sample(self, request: Request, params: SamplingParams) -> dict[str, Any]:
        stops = list(params.stop_token_ids)
        sampling_params = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "max_new_tokens": request.limit(params),
            "stop_token_ids": stops,
            "ignore_eos": not stops,  # true would ignore the stop tokens as well
        }
        ids = request.token_ids.tolist()
        output: dict[str, Any] = await self._engine.async_generate(
            input_ids=ids, sampling_params=sampling_params, return_logprob=params.logprobs
        )
        return output

    async def _loglikelihood(self, continuation: Continuation) -> Tensor:
        """Return [T - start] float32, the log-probabilities of the continuation's tokens."""
        ids = continuation.token_ids.tolist()
        output = await self._engine.async_generate(
            input_ids=ids,
            sampling_params={"max_new_tokens": 1, "temperature": 0.0},
            return_logprob=True,
            logprob_start_len=continuation.start - 1,  # the first token from there on gets no log-probability
        )
        entries = output["meta_info"]["input_token_logprobs"][1:]
        if [entry[1] for entry in entries] != ids[continuation.start :]:
            raise EngineError("SGLang reported log-probabilities of other tokens than those of the continuation.")
        return torch.tensor([entry[0] for entry in entries], dtype=torch.float32)

    def _completion(self, output: Mapping[str, Any]) -> Completion:
        tokens, meta_info = list(output["output_ids"]), output["meta_info"]
        # log-probabilities are absent if none were requested
        logprobs = meta_info.get("output_token_logprobs", [(math.nan, token) for token in tokens]) if tokens else []
        if [entry[1] for entry in logprobs] != tokens:
            raise EngineError("SGLang reported log-probabilities of other tokens than those it returned.")
        return Completion(
            token_ids=torch.tensor(tokens, dtype=torch.int64),
            logprobs=torch.tensor([entry[0] for entry in logprobs], dtype=torch.float32),
            finish_reason=finish_reason(meta_info["finish_reason"]["type"]),
            policy_version=self._version,
        )

    def _send(self, bundle: list[tuple[str, Tensor]]) -> None:
        """Send every rank's tensors to the child with its TP rank; collective over the engine's ranks."""
        from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

        flat = FlattenedTensorBucket(named_tensors=bundle)
        content = {"flattened_tensor": flat.get_flattened_tensor(), "metadata": flat.get_metadata()}
        payload = _serialized(content, self._setup.device)
        payloads = gather_over(payload, self.place.tp_size, self.place.group)
        # every rank waits here, so that its tensors stay allocated until the children have read them
        self._call_engine("update_weights_from_tensor", payloads, load_format="flattened_bucket", flush_cache=False)

    def _call_engine(self, method: str, *arguments: Any, **options: Any) -> None:
        """Call a method of ``sglang.Engine`` on the leader; collective over the engine's ranks.

        Raises:
            WeightSyncError: on all ranks, if SGLang reports that the call failed.
            EngineDied: on all ranks, if SGLang does not answer.
        """
        failure: EngineDied | WeightSyncError | None = None
        if self._engine is not None:
            try:
                with self._watch.waiting():
                    answer = getattr(self._engine, method)(*arguments, **options)
                success, message = answer if isinstance(answer, tuple) else (answer.success, answer.message)
                failure = None if success else WeightSyncError(f"SGLang failed in {method}: {message}")
            except EngineDied as error:
                failure = error
        failure = self.place.from_leader(failure)
        if failure is not None:
            raise failure


def _write_config(source: Path, target: Path, positions: int) -> None:
    """Write the model's config.json without end-of-sequence tokens, at which SGLang would stop as well.

    Args:
        source: folder with the model's config.json.
        target: folder to write to.
        positions: smallest ``max_position_embeddings`` to write; SGLang rejects a context that is longer than that.
    """
    config = json.loads((source / "config.json").read_text())
    longest = max(positions, config["max_position_embeddings"])
    changed = {**config, "eos_token_id": None, "max_position_embeddings": longest}
    (target / "config.json").write_text(json.dumps(changed))


def _serialized(content: Mapping[str, Any], device: torch.device) -> str:
    """Serialize tensors for SGLang's children: as handles of GPU memory, or as bytes on CPUs.

    torch's shared host memory is not used, because its manager times out after a second on a busy machine.
    """
    if device.type == "cpu":
        return base64.b64encode(pickle.dumps(content)).decode()
    from sglang.srt.utils import MultiprocessingSerializer

    handles: str = MultiprocessingSerializer.serialize(content, output_str=True)
    return handles


def _bundles(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield bundles of whole layers, ended once they have ``BUNDLE_BYTES``.

    The tensors are copied, because those of the next layer may use the same memory.
    """
    bundle: list[tuple[str, Tensor]] = []
    size, layer = 0, None
    for name, tensor in tensors:
        if layer not in (None, layer_of(name)) and size >= BUNDLE_BYTES:
            yield bundle
            bundle, size = [], 0
        bundle.append((name, tensor.clone()))
        size += tensor.numel() * tensor.element_size()
        layer = layer_of(name)
    if bundle:
        yield bundle


def _arguments(device: torch.device, max_total_tokens: int) -> dict[str, Any]:
    """Return the arguments of ``sglang.Engine`` that depend on the device."""
    if device.type == "cuda":
        return {"enable_memory_saver": True}
    return {
        "device": "cpu",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "disable_cuda_graph": True,
        "disable_overlap_schedule": True,
        "max_total_tokens": max(4096, min(max_total_tokens, 2**16)),
    }


def _environment(setup: EngineSetup) -> dict[str, str]:
    """Return the environment variables that SGLang reads while it starts."""
    if setup.device.type != "cpu":
        return {}
    # compilation would take longer than the short runs that CPU engines are meant for
    values = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    cores, first = sorted(os.sched_getaffinity(0)), setup.place.leader
    ranks = range(first, first + setup.place.tp_size)
    values["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[rank % len(cores)]) for rank in ranks)
    return values


async def _wait_for_any(tasks: Collection[asyncio.Task[Any]], timeout_s: float | None) -> set[asyncio.Task[Any]]:
    """Return the tasks that are done, at least one unless the time is over."""
    done, _ = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    return done


async def _start_handle_loop(manager: Any) -> None:
    """Start SGLang's handling of answers, with which it sets signal handlers; otherwise its first request does both."""
    manager.auto_create_handle_loop()


def _ignore(*_: Any) -> None:
    """Handle SIGQUIT of a child that failed by doing nothing: the ChildWatch detects the failure."""
