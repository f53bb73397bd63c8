"""LoRA adapters under every layout, against PEFT, and in a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from megatron_rl.errors import ConfigError, ConversionError
from megatron_rl.trainer.inputs import load_inputs
from tests.distributed import cases
from tests.distributed.layouts import OVERLAP, PADDED, keys, layout_cases
from tests.distributed.test_invariance import rows
from tests.gang import Gang
from tests.toys import CHANGED_BY_RESUME, sequences, toy_config, without

# with the default epsilon, Adam takes full steps for gradients that are rounding noise, which differs between layouts
LORA = (
    *("lora.rank=4", "lora.alpha=8", "optimizer.lr=0.02", "batching.num_mini_batches=1"),
    *("algorithm.kl_coef=0", "optimizer.adam_eps=1e-4"),
)
MODEL_SPLITS = (("", "tp2", "tp2 sp"), ("", "pp2", "pp2 vpp2"), ("", "cp2"), ("", "dp2"))
OPTIONS = (
    ("", f"{PADDED} batching.micro_batch_size=3"),
    ("", "memory.recompute=full"),
    ("", OVERLAP),
)


@pytest.fixture(scope="module")
def model(toy_model: Callable[..., Path]) -> Path:
    return toy_model("qwen2", tied=True, num_hidden_layers=4)


@pytest.fixture(scope="module")
def one_rank(
    gangs: Callable[[int], Gang], model: Path, tmp_path_factory: pytest.TempPathFactory
) -> cases.AdapterOutcome:
    folder = tmp_path_factory.mktemp("alone")
    (outcome,) = gangs(1).call(
        cases.update_with_adapters, config=toy_config(folder, model, *LORA), folder=str(folder / "adapter")
    )
    return outcome


def test_only_adapters_are_trained(
    one_rank: cases.AdapterOutcome, gangs: Callable[[int], Gang], model: Path, tmp_path: Path
) -> None:
    assert not one_rank.frozen_changed
    assert len(one_rank.adapters) == 4 * 7 * 2
    assert all(x.any() for x in one_rank.adapters.values())
    assert (
        max(float((one_rank.base_logprobs[index] - row).abs().max()) for index, row in one_rank.logprobs.items()) > 0.1
    )
    base = load_file(model / "model.safetensors")
    changed = {name for name, x in one_rank.merged.items() if not torch.equal(x, base[name])}
    assert changed == {name for name in base if "_proj.weight" in name}
    (whole,) = gangs(1).call(
        cases.update_with_adapters, config=toy_config(tmp_path, model, "batching.num_mini_batches=1")
    )
    assert whole.frozen_changed
    assert one_rank.trainable_bytes < 0.3 * whole.trainable_bytes


@layout_cases(*MODEL_SPLITS, *OPTIONS)
def test_adapter_updates_are_equal_under_every_layout(
    world_size: int,
    layout: str,
    one_rank: cases.AdapterOutcome,
    gangs: Callable[[int], Gang],
    model: Path,
    tmp_path: Path,
) -> None:
    config = toy_config(tmp_path, model, *LORA, *keys(layout))
    for outcome in gangs(world_size).call(cases.update_with_adapters, config=config):
        assert outcome.norms == pytest.approx(one_rank.norms, rel=1e-4)
        assert not outcome.frozen_changed
        for actual, expected in ((outcome.adapters, one_rank.adapters), (outcome.merged, one_rank.merged)):
            assert actual.keys() == expected.keys()
            assert max(float((actual[name] - expected[name]).abs().max()) for name in expected) < 1e-5
        for index, row in outcome.logprobs.items():
            assert row.tolist() == pytest.approx(one_rank.logprobs[index].tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("world_size", "layout", "targets"),
    [(1, "", None), (2, "tp2", None), (2, "tp2 sp", "[q_proj,v_proj,down_proj]"), (2, "pp2", "[o_proj,up_proj]")],
)
def test_peft_gives_the_same_logits(
    world_size: int,
    layout: str,
    targets: str | None,
    gangs: Callable[[int], Gang],
    model: Path,
    tmp_path: Path,
) -> None:
    chosen = [f"lora.targets={targets}"] if targets else []
    config = toy_config(tmp_path, model, *LORA, *keys(layout), *chosen)
    outcomes = gangs(world_size).call(cases.update_with_adapters, config=config, folder=str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        peft_model = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        merged = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        merged.load_state_dict(outcomes[0].merged, strict=False)
        for index, sequence in enumerate(sequences(cases.LENGTHS)):
            tokens = sequence.token_ids[None]
            logits = peft_model(tokens).logits[0]
            assert (logits - merged(tokens).logits[0]).abs().max() < 1e-5
            expected = logits[:-1].log_softmax(-1).gather(1, sequence.token_ids[1:, None])[:, 0]
            actual = next(outcome.logprobs[index] for outcome in outcomes if index in outcome.logprobs)
            mask = sequence.loss_mask[1:]
            torch.testing.assert_close(actual[1:][mask], expected[mask], atol=1e-5, rtol=0)
    again = toy_config(tmp_path, model, *LORA, *keys("tp2"), *chosen, f"lora.path={tmp_path / 'adapter'}")
    for resumed in gangs(2).call(cases.initial_logprobs, config=again):
        for index, row in resumed.items():
            actual = next(outcome.logprobs[index] for outcome in outcomes if index in outcome.logprobs)
            assert row.tolist() == pytest.approx(actual.tolist(), abs=1e-5)


def test_a_run_pushes_merged_weights_and_resumes_bit_for_bit(
    gangs: Callable[[int], Gang], model: Path, tmp_path: Path
) -> None:
    options = (*LORA[:4], *keys("tp2 pp2"), "weight_sync.probe_limit=1e-5", "checkpoint.save_hf=true")

    def run(name: str, *more: str) -> list[dict[str, Any]]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        gangs(4).call(cases.run_training, config=toy_config(folder, model, *options, *more))
        return without(CHANGED_BY_RESUME, rows(folder / "run"))

    whole = run("whole", "run.num_steps=6")
    run("parts")
    assert run("parts", "run.num_steps=6") == whole
    assert whole[1]["actor/kl_loss"] == pytest.approx(0, abs=1e-6), "the reference is the model without adapters"
    assert whole[-1]["actor/kl_loss"] > 1e-4
    assert max(row["train_rollout_logprob_abs_diff/max"] for row in whole[1:]) < 1e-4
    checkpoint = tmp_path / "whole/run/checkpoints/step_000006"
    saved = FileSystemReader(checkpoint / "policy").read_metadata().state_dict_metadata
    assert saved
    assert not [name for name in saved if "word_embeddings" in name or name.endswith("linear_qkv.weight")]
    assert json.loads((checkpoint / "adapter/adapter_config.json").read_text())["r"] == 4
    tokens = torch.arange(12)[None]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        peft_logits = PeftModel.from_pretrained(base, str(checkpoint / "adapter")).eval()(tokens).logits
        merged_logits = AutoModelForCausalLM.from_pretrained(checkpoint / "hf", dtype=torch.float32)(tokens).logits
    assert (peft_logits - merged_logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("qwen3_moe", ["lora.rank=4"], r"on the experts of .* Set lora\.targets=\[q_proj,k_proj,v_proj,o_proj\]"),
        ("qwen2", ["lora.rank=4", "model.implementation=transformer_engine"], "implementation"),
        ("qwen2", ["lora.path=somewhere"], r"lora\.path=somewhere.*lora\.rank"),
        ("qwen2", ["lora.rank=4", "lora.targets=[q_proj,q_proj]"], r"lora\.targets"),
        ("qwen2", ["lora.rank=4", "lora.targets=[lm_head]"], r"lora\.targets"),
        ("qwen2", ["lora.quantize=nf4"], r"lora\.quantize=nf4: expected none unless lora\.rank is above 0"),
        ("qwen2", ["lora.rank=4", "lora.quantize=nf4"], r"q_proj has 32 columns on each rank.*multiple of the 64"),
        (
            "qwen3_moe",
            ["lora.rank=4", "lora.targets=[q_proj]", "lora.quantize=int8"],
            r"the experts of .* would not be quantised",
        ),
    ],
)
def test_contradictory_options_are_rejected(
    family: str, overrides: list[str], message: str, toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_inputs(toy_config(tmp_path, toy_model(family, tied=False), *overrides), 1)


QUANTIZED = [(2, "tp2 sp"), (2, "pp2 memory.recompute=full"), (2, "cp2"), (4, "tp2 memory.offload=[params]")]


@pytest.fixture(scope="module")
def wide(toy_model: Callable[..., Path]) -> Path:
    """A model with 64 columns, one quantisation block, on each of two ranks."""
    return toy_model("qwen2", tied=True, hidden_size=128, intermediate_size=256)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_model_updates_are_equal_under_every_layout(
    kind: str, gangs: Callable[[int], Gang], wide: Path, tmp_path: Path
) -> None:
    options = (*LORA, f"lora.quantize={kind}")
    (one_rank,) = gangs(1).call(cases.update_with_adapters, config=toy_config(tmp_path, wide, *options))
    assert not one_rank.frozen_changed
    base = load_file(wide / "model.safetensors")
    codes = {"int8": 256, "nf4": 16}[kind]
    (frozen,) = gangs(1).call(cases.initial_weights, config=toy_config(tmp_path, wide, *options))
    for name, weight in frozen.items():
        if "_proj.weight" not in name:
            assert torch.equal(weight, base[name])
            continue
        blocks, expected = weight.unflatten(1, (-1, 64)), base[name].unflatten(1, (-1, 64))
        assert len(blocks[0, 0].unique()) <= codes
        largest = expected.abs().amax(-1, keepdim=True)
        assert ((blocks - expected).abs() <= largest * {"int8": 0.5 / 127, "nf4": 0.152}[kind] + 1e-6).all()
    hf = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32)
    hf.load_state_dict(one_rank.merged, strict=False)
    for index, sequence in enumerate(sequences(cases.LENGTHS)):
        with torch.no_grad():
            logits = hf(sequence.token_ids[None]).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(1, sequence.token_ids[1:, None])[:, 0]
        mask = sequence.loss_mask[1:]
        torch.testing.assert_close(one_rank.logprobs[index][1:][mask], expected[mask], atol=1e-4, rtol=0)
    for world_size, layout in QUANTIZED:
        for outcome in gangs(world_size).call(
            cases.update_with_adapters, config=toy_config(tmp_path, wide, *options, *keys(layout))
        ):
            assert outcome.norms == pytest.approx(one_rank.norms, rel=1e-4), layout
            assert (
                max(float((outcome.merged[name] - one_rank.merged[name]).abs().max()) for name in one_rank.merged)
                < 1e-5
            )
            for index, row in outcome.logprobs.items():
                assert row.tolist() == pytest.approx(one_rank.logprobs[index].tolist(), abs=1e-4)


def test_writing_into_a_quantized_matrix_raises() -> None:
    from megatron_rl.mcore.model.quantized import quantized

    weight = quantized(torch.randn(2, 64), "int8")
    for write in (lambda: weight.mul_(2), lambda: weight.copy_(torch.zeros(2, 64))):
        with pytest.raises(TypeError, match="writes into a quantised matrix"):
            write()


def test_a_run_on_a_quantized_model_pushes_merged_weights(
    gangs: Callable[[int], Gang], wide: Path, tmp_path: Path
) -> None:
    options = (*LORA[:4], "lora.quantize=nf4", *keys("tp2"), "weight_sync.probe_limit=1e-4")
    gangs(2).call(cases.run_training, config=toy_config(tmp_path, wide, *options))
    metrics = rows(tmp_path / "run")
    assert max(row["train_rollout_logprob_abs_diff/max"] for row in metrics[1:]) < 1e-4
    assert metrics[1]["actor/kl_loss"] == pytest.approx(0, abs=1e-6), "the reference is the quantised model"
    assert metrics[-1]["actor/kl_loss"] > 1e-4


def test_mismatched_adapters_are_rejected(
    one_rank: cases.AdapterOutcome, gangs: Callable[[int], Gang], model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "adapter"
    gangs(1).call(cases.update_with_adapters, config=toy_config(tmp_path, model, *LORA), folder=str(path))
    for overrides, message in (
        (["lora.rank=8", "lora.alpha=8"], "r is 4, but lora.rank=8"),
        (["lora.rank=4", "lora.alpha=16"], "lora_alpha is 8.*but lora.alpha=16"),
        (["lora.rank=4", "lora.alpha=8", "lora.targets=[q_proj]"], "56 matrices, expected 8.*Set lora.targets"),
    ):
        with pytest.raises(ConversionError, match=message):
            load_inputs(toy_config(tmp_path, model, *overrides, f"lora.path={path}"), 1)
    (path / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(ConversionError, match="cannot be read"):
        load_inputs(toy_config(tmp_path, model, *LORA, f"lora.path={path}"), 1)


def test_adapters_are_saved_under_expert_parallelism(
    gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The ranks that hold parts of the experts export together, data-parallel ranks among them."""
    options = (
        "lora.rank=2",
        "lora.targets=[q_proj,k_proj,v_proj,o_proj]",
        "checkpoint.save_hf=true",
        "run.num_steps=1",
    )
    for layout in ("ep2", "ep2 pp2"):
        folder = tmp_path / layout.replace(" ", "_")
        folder.mkdir()
        config = toy_config(folder, toy_model("qwen3_moe", tied=False), *options, *keys(layout))
        gangs(4).call(cases.run_training, config=config)
        checkpoint = folder / "run/checkpoints/step_000001"
        assert len(load_file(checkpoint / "adapter/adapter_model.safetensors")) == 2 * 4 * 2
        assert (checkpoint / "hf/model.safetensors").exists()
