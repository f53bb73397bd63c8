"""Tests that need a GPU: python -m pytest tests/gpu."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import megatron_rl.mcore  # noqa: F401  prepares Megatron-Core
from megatron_rl.batching.batch import given_batch
from megatron_rl.errors import ConfigError
from megatron_rl.mcore.model.attention import group_by_length
from megatron_rl.mcore.model.precision import FP8_NEEDS, choose_implementation
from megatron_rl.mcore.model.varlen import variable_length_kernel
from megatron_rl.mcore.policy import Policy
from megatron_rl.mcore.reference import HostReference
from megatron_rl.mcore.runtime.parallel import init_parallel, leave_world
from megatron_rl.types import ParallelContext, TrainBatch
from tests.toys import sequences, toy_config, write_model

LENGTHS = (64, 48, 100, 37)
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ParallelContext]:
    folder = tmp_path_factory.mktemp("world")
    yield init_parallel(toy_config(folder, folder).parallel)
    leave_world()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gpu") / "model", "qwen2", tied=True, **SIZES)


@pytest.fixture
def policy(parallel: ParallelContext, model: Path, tmp_path: Path) -> Callable[..., Policy]:
    """Return a function that builds a policy from overrides."""

    def build(*overrides: str) -> Policy:
        return Policy(toy_config(tmp_path, model, *overrides), parallel)

    return build


def batch(num_updates: int = 1) -> TrainBatch:
    return given_batch(sequences(LENGTHS), [[0, 1], [2, 3]], num_updates=num_updates)


def logprobs(policy: Policy) -> torch.Tensor:
    return torch.cat(policy.logprobs(batch()))


def norm(policy: Policy, num_updates: int = 1) -> float:
    return policy.update(batch(num_updates))["actor/grad_norm"].result()


def test_variable_length_kernel_equals_padded_attention(parallel: ParallelContext) -> None:
    torch.manual_seed(0)
    ends = tuple(torch.tensor((0, *LENGTHS)).cumsum(0).tolist())
    query = torch.randn(ends[-1], 8, 64, dtype=torch.bfloat16, device="cuda")
    key, value = torch.randn(2, ends[-1], 2, 64, dtype=torch.bfloat16, device="cuda")
    kernel = variable_length_kernel(query.device, query.dtype)
    assert kernel is not None
    actual = kernel(query, key, value, torch.tensor(ends, dtype=torch.int32, device="cuda"), max(LENGTHS), None)
    for group in group_by_length(ends, query.device):
        q, k, v = (x[group.padded_rows].transpose(1, 2) for x in (query, key, value))
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        rows = expected.transpose(1, 2).flatten(0, 1)[group.real]
        torch.testing.assert_close(actual[group.packed_rows], rows, rtol=2e-2, atol=2e-2)


def test_bf16_is_near_fp32(policy: Callable[..., Policy]) -> None:
    expected = logprobs(policy("model.implementation=local"))
    actual = logprobs(policy("model.implementation=local", "model.dtype=bf16"))
    assert (actual - expected).abs().mean() < 0.05


@pytest.mark.transformer_engine
@pytest.mark.parametrize("packed", ["true", "false"])
def test_transformer_engine_equals_the_local_modules(packed: str, policy: Callable[..., Policy]) -> None:
    common = ("model.dtype=bf16", f"batching.packed={packed}")
    local = policy("model.implementation=local", *common)
    engine = policy("model.implementation=transformer_engine", *common)
    assert (logprobs(local) - logprobs(engine)).abs().mean() < 0.02
    assert norm(engine) == pytest.approx(norm(local), rel=0.05)
    exported = [{name: tensor.float() for name, tensor in model_.export()} for model_ in (local, engine)]
    assert set(exported[0]) == set(exported[1])


@pytest.mark.transformer_engine
@pytest.mark.parametrize("params", ["false", "true"], ids=["bf16-params", "fp8-params"])
@pytest.mark.parametrize("recipe", FP8_NEEDS)
def test_fp8_is_near_bf16(recipe: str, params: str, policy: Callable[..., Policy], model: Path, tmp_path: Path) -> None:
    overrides = ("model.dtype=bf16", f"precision.fp8={recipe}", f"precision.fp8_params={params}")
    try:
        choose_implementation(toy_config(tmp_path, model, *overrides))
    except ConfigError as error:
        pytest.skip(str(error))
    plain, fp8 = policy("model.dtype=bf16"), policy(*overrides)
    assert (logprobs(plain) - logprobs(fp8)).abs().mean() < 0.2
    assert norm(fp8) == pytest.approx(norm(plain), rel=0.2)
    assert all(torch.isfinite(tensor).all() for _, tensor in fp8.export())


@pytest.mark.transformer_engine
def test_bf16_layers_equal_a_bf16_model(policy: Callable[..., Policy], model: Path, tmp_path: Path) -> None:
    overrides = ("model.dtype=bf16", "precision.fp8=tensorwise", "precision.bf16_first_layers=4")
    try:
        choose_implementation(toy_config(tmp_path, model, *overrides))
    except ConfigError as error:
        pytest.skip(str(error))
    torch.testing.assert_close(logprobs(policy(*overrides)), logprobs(policy("model.dtype=bf16")), rtol=0, atol=1e-6)


@pytest.mark.transformer_engine
def test_fused_adam_equals_torch(policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import optimizer as megatron_optimizer

    fused = policy("model.dtype=bf16")
    assert "torch.optim" not in type(fused.optimizer.chained_optimizers[0].optimizer).__module__
    monkeypatch.setattr(megatron_optimizer, "Adam", torch.optim.AdamW)
    monkeypatch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", True)
    plain = policy("model.dtype=bf16")
    norm(fused, 4)
    norm(plain, 4)
    plain_weights = dict(plain.export())
    for name, tensor in fused.export():
        torch.testing.assert_close(tensor.float(), plain_weights[name].float(), rtol=2e-2, atol=1e-3)


@pytest.mark.transformer_engine
@pytest.mark.parametrize("states", ["bf16", "fp8"])
def test_low_precision_optimizer_states_are_near_fp32(states: str, policy: Callable[..., Policy]) -> None:
    common = ("model.dtype=bf16",)
    assert norm(policy(*common, f"optimizer.states_dtype={states}"), 3) == pytest.approx(
        norm(policy(*common), 3), rel=0.05
    )


def test_an_optimizer_on_the_host_is_near_one_on_the_device(policy: Callable[..., Policy]) -> None:
    common = ("model.dtype=bf16",)
    device, host = policy(*common), policy(*common, "optimizer.cpu_offload_fraction=1.0")
    norm(device, 3)
    norm(host, 3)
    assert (logprobs(device) - logprobs(host)).abs().mean() < 0.02


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_offload_frees_device_memory_and_changes_nothing(dtype: str, policy: Callable[..., Policy]) -> None:
    common = (f"model.dtype={dtype}", "model.implementation=local")
    offloaded, resident = policy(*common, "memory.offload=[params,grads,optimizer]"), policy(*common)
    assert norm(offloaded) == norm(resident)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    freed = offloaded.learner.to_host()
    assert before - torch.cuda.memory_allocated() >= freed > 0
    offloaded.learner.to_device()
    assert norm(offloaded) == norm(resident)
    assert torch.equal(logprobs(offloaded), logprobs(resident))


def test_a_hosted_reference_costs_no_device_memory(policy: Callable[..., Policy], model: Path) -> None:
    learner = policy("model.dtype=bf16")
    before = logprobs(learner)
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    reference = HostReference(learner, str(model))
    assert torch.cuda.memory_allocated() == allocated
    norm(learner)
    changed = logprobs(learner)
    assert torch.equal(torch.cat(reference.logprobs(batch())), before)
    assert torch.equal(logprobs(learner), changed)


@pytest.mark.parametrize("modules", ["core_attn", "core_attn,layernorm,mlp"])
def test_recomputation_changes_nothing(modules: str, policy: Callable[..., Policy]) -> None:
    common = ("model.dtype=bf16",)
    selective = policy(*common, "memory.recompute=selective", f"memory.recompute_modules=[{modules}]")
    expected = norm(policy(*common))
    assert norm(selective) == pytest.approx(expected, rel=1e-2)
    assert norm(policy(*common, "memory.recompute=full")) == pytest.approx(expected, rel=1e-2)


def test_chunks_of_logits_change_nothing(policy: Callable[..., Policy]) -> None:
    whole = policy("model.implementation=local", "batching.logprob_chunk_tokens=100000")
    chunked = policy("model.implementation=local", "batching.logprob_chunk_tokens=7")
    torch.testing.assert_close(logprobs(whole), logprobs(chunked), rtol=0, atol=1e-4)
