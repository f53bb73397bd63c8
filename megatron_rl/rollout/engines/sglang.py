"""SGLang beside the trainer: its schedulers are child processes of the first rank of each engine.

Written against SGLang 0.5.11 to 0.5.23. Every rank hands its child the part that it reads.
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
from megatron_rl.rollout.engines.children import ChildWatch, own_signals
from megatron_rl.rollout.engines.hosting import DTYPES, finish_reason, surroundings
from megatron_rl.rollout.engines.loading import ExpectedTensors
from megatron_rl.types import Completion, SamplingParams
from megatron_rl.weights.layout import hf_shapes, layer_of

# bytes of whole layers that go over at a time
BUNDLE_BYTES = 2**28
# SGLang ends a sequence two tokens before its context does, and takes no prompt that ends in the last six
SPARE_TOKENS = 8
# how often a job that may be stopped is asked
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
    """This rank's part of an SGLang engine; the first rank owns it."""

    starts_together = False

    def __init__(self, setup: EngineSetup, *, seed: int) -> None:
        """Start the engine.

        Args:
            setup: its options are further arguments of ``sglang.Engine``.
            seed: of this engine's sampling, which has one random state for all requests.

        Raises:
            EngineError: SGLang is not installed, does not start, or would not compute the model.
        """
        window = setup.spec.sliding_window
        if window is not None and window.size < setup.max_model_len:
            raise EngineError(
                f"SGLang attends to all tokens where this model attends to the last {window.size}, and sequences may "
                f"have {setup.max_model_len}. Use rollout.engine=vllm, or shorten prompts and responses to the window."
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
            "load_format": "dummy",  # the first push brings the weights
            "skip_tokenizer_init": True,
            "dtype": DTYPES[setup.dtype],
            "context_length": setup.max_model_len + SPARE_TOKENS,
            "max_running_requests": setup.max_num_sequences,
            "tp_size": self.place.tp_size,
            "base_gpu_id": setup.local_rank if setup.device.type == "cuda" else 0,
            "random_seed": self._seed,
            "log_level": "error",
            "sleep_on_idle": True,  # a scheduler that polls takes a core from the trainer while that learns
            "custom_sigquit_handler": _ignore,  # a child that fails sends it; the trainer would end with the child
            **_arguments(setup.device, setup.max_num_sequences * (setup.max_model_len + SPARE_TOKENS)),
            **setup.options,
        }
        with surroundings(_environment(setup), LAUNCHER_VARIABLES):
            try:
                import sglang
            except ImportError as error:
                raise EngineError(
                    f"rollout.engine=sglang, but it cannot be imported: {error}. See docs/engines.md."
                ) from error
            before = set(active_children())
            with own_signals():
                try:
                    self._engine = sglang.Engine(**arguments)
                except RuntimeError as error:
                    raise EngineError(f"SGLang does not start: {error}") from error
                manager, loop = self._engine.tokenizer_manager, self._engine.loop
                loop.run_until_complete(_begin_answers(manager))
                for one in (signal.SIGTERM, signal.SIGQUIT):
                    loop.remove_signal_handler(one)
            signal.signal(signal.SIGQUIT, _ignore)
        # SGLang's own watch ends this process when a child is gone, and its shutdown ends all children of this process,
        # reward workers and torch's memory manager as well
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
        self._tell("begin_weight_update")
        try:
            for bundle in _bundles(self._expected.watch(tensors)):
                self._hand_over(bundle)
            self._expected.check_complete()
        finally:  # also of a push that failed: the next one could not begin
            self._tell("end_weight_update")
        self._tell("flush_cache")  # it would answer from the weights before
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
                f"SGLang reports log-probabilities of the whole distribution, but top_p={params.top_p} and "
                f"top_k={params.top_k} sample from a part of it. Set rollout.top_p=1 and rollout.top_k=0."
            )
        if self._engine is None:
            return
        # the other ranks have nothing to do with requests
        alone = replace(self._setup, place=replace(self.place, group=None))
        admission = Admission(
            requests, params, alone, version=self._version, max_requests=max_requests, should_stop=should_stop
        )
        is_over, is_answered = False, True
        loop = self._engine.loop
        owners: dict[asyncio.Task[Any], tuple[int, int]] = {}
        try:
            while True:
                is_over = is_over or admission.is_over()
                for request in () if is_over else admission.pull():
                    for sample in range(len(request.seeds)):
                        owners[loop.create_task(self._sample(request, params))] = (request.key, sample)
                if not owners:
                    return
                if is_over:  # each time: a request that has not reached the engine yet would not hear of it
                    self._engine.tokenizer_manager.abort_request(abort_all=True)
                with self._watch.waiting(goes_on=not is_answered):
                    done = loop.run_until_complete(_some_of(owners, STOP_POLL_S))
                is_answered = bool(done)
                for task in done:
                    key, sample = owners.pop(task)
                    admission.finish(key)
                    yield Finished(key=key, sample=sample, completion=self._completion(task.result()))
        finally:
            self._give_up(owners)

    def score(self, continuations: Sequence[Continuation]) -> list[Tensor]:
        check_continuations(continuations, self._setup, version=self._version)
        if self._engine is None:
            return []
        tasks = [self._engine.loop.create_task(self._score(one)) for one in continuations]
        waiting = set(tasks)
        try:
            while waiting:
                with self._watch.waiting():
                    waiting -= self._engine.loop.run_until_complete(_some_of(waiting, None))
        finally:
            self._give_up(waiting)
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
        return {}  # it is its children's

    def restart(self) -> None:
        self.close()
        if self.place.is_leader:
            self._start()

    def close(self) -> None:
        self._version = -1
        if self._watch is not None:
            self._watch.kill()
        self._watch = self._engine = None

    def _give_up(self, tasks: Collection[asyncio.Task[Any]]) -> None:
        if not tasks:
            return
        if not self._watch.lost:
            self._engine.tokenizer_manager.abort_request(abort_all=True)
            with suppress(EngineDied), self._watch.waiting():  # whoever uses it next hears of a death
                self._engine.loop.run_until_complete(asyncio.wait(tasks))
        if self._watch.lost:
            self._watch.abandon(tasks)

    async def _sample(self, request: Request, params: SamplingParams) -> dict[str, Any]:
        stops = list(params.stop_token_ids)
        wanted = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "max_new_tokens": request.limit(params),
            "stop_token_ids": stops,
            "ignore_eos": not stops,  # which would ignore the stop tokens as well
        }
        ids = request.token_ids.tolist()
        found: dict[str, Any] = await self._engine.async_generate(
            input_ids=ids, sampling_params=wanted, return_logprob=params.logprobs
        )
        return found

    async def _score(self, asked: Continuation) -> Tensor:
        """[T - start] float32."""
        ids = asked.token_ids.tolist()
        found = await self._engine.async_generate(
            input_ids=ids,
            sampling_params={"max_new_tokens": 1, "temperature": 0.0},
            return_logprob=True,
            logprob_start_len=asked.start - 1,  # it says nothing about the first token of those
        )
        entries = found["meta_info"]["input_token_logprobs"][1:]
        if [entry[1] for entry in entries] != ids[asked.start :]:
            raise EngineError("SGLang reported log-probabilities of other tokens than those it was asked about.")
        return torch.tensor([entry[0] for entry in entries], dtype=torch.float32)

    def _completion(self, found: Mapping[str, Any]) -> Completion:
        tokens, about = list(found["output_ids"]), found["meta_info"]
        # none were asked for where there are none
        logprobs = about.get("output_token_logprobs", [(math.nan, token) for token in tokens]) if tokens else []
        if [entry[1] for entry in logprobs] != tokens:
            raise EngineError("SGLang reported log-probabilities of other tokens than those it returned.")
        return Completion(
            token_ids=torch.tensor(tokens, dtype=torch.int64),
            logprobs=torch.tensor([entry[0] for entry in logprobs], dtype=torch.float32),
            finish_reason=finish_reason(about["finish_reason"]["type"]),
            policy_version=self._version,
        )

    def _hand_over(self, bundle: list[tuple[str, Tensor]]) -> None:
        """Give every child of the engine its rank's tensors; collective over the engine's ranks."""
        from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

        flat = FlattenedTensorBucket(named_tensors=bundle)
        content = {"flattened_tensor": flat.get_flattened_tensor(), "metadata": flat.get_metadata()}
        mine = _serialized(content, self._setup.device)
        payloads = gather_over(mine, self.place.tp_size, self.place.group)
        # the memory lives until the children have read it: all ranks hear of it
        self._tell("update_weights_from_tensor", payloads, load_format="flattened_bucket", flush_cache=False)

    def _tell(self, method: str, *arguments: Any, **options: Any) -> None:
        """Let the leader call a method of the engine that changes it; collective over the engine's ranks.

        Raises:
            WeightSyncError: on all of them, when SGLang says that it failed.
            EngineDied: on all of them, when SGLang does not answer.
        """
        failure: EngineDied | WeightSyncError | None = None
        if self._engine is not None:
            try:
                with self._watch.waiting():
                    answer = getattr(self._engine, method)(*arguments, **options)
                success, message = answer if isinstance(answer, tuple) else (answer.success, answer.message)
                failure = None if success else WeightSyncError(f"SGLang refused {method}: {message}")
            except EngineDied as error:
                failure = error
        failure = self.place.from_leader(failure)
        if failure is not None:
            raise failure


def _write_config(source: Path, target: Path, positions: int) -> None:
    """The model's configuration without tokens that end a response, at which SGLang would stop as well.

    Args:
        positions: that it has at least, or SGLang refuses its own spare ones.
    """
    config = json.loads((source / "config.json").read_text())
    longest = max(positions, config["max_position_embeddings"])
    changed = {**config, "eos_token_id": None, "max_position_embeddings": longest}
    (target / "config.json").write_text(json.dumps(changed))


def _serialized(content: Mapping[str, Any], device: torch.device) -> str:
    """As SGLang's children read it: handles of GPU memory, or the bytes themselves on the host.

    torch's shared memory of the host is not used: its manager gives up after a second on a busy machine.
    """
    if device.type == "cpu":
        return base64.b64encode(pickle.dumps(content)).decode()
    from sglang.srt.utils import MultiprocessingSerializer

    handles: str = MultiprocessingSerializer.serialize(content, output_str=True)
    return handles


def _bundles(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Whole layers, as many as fit a bundle; copied, because the next layer's tensors may use the same memory."""
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
    """What depends on the device."""
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
    """Variables that SGLang reads while it starts."""
    if setup.device.type != "cpu":
        return {}
    # compiling takes longer than the short runs that engines on CPUs are for
    values = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    cores, first = sorted(os.sched_getaffinity(0)), setup.place.leader
    ranks = range(first, first + setup.place.tp_size)
    values["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[rank % len(cores)]) for rank in ranks)
    return values


async def _some_of(tasks: Collection[asyncio.Task[Any]], timeout_s: float | None) -> set[asyncio.Task[Any]]:
    """Those that are done, at least one of them unless the time is over."""
    done, _ = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    return done


async def _begin_answers(manager: Any) -> None:
    """What SGLang does at its first request, together with the handlers of signals that it sets then."""
    manager.auto_create_handle_loop()


def _ignore(*_: Any) -> None:
    """What the trainer makes of a child's failure: the watch finds it."""
