"""Tools that compare, inspect and convert checkpoints, called as a user calls them."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rl.conversion.ranks import Ranks
from megatron_rl.conversion.to_megatron import convert_to_megatron
from megatron_rl.models.families import FAMILIES as FAMILIES_BY_NAME
from megatron_rl.models.toy import FAMILIES
from megatron_rl.train import main as train
from tests.limits import LIMIT_S
from tests.toys import write_config
from tools import check_parity, inspect_checkpoint

ROOT = Path(__file__).parents[2]


def convert(source: Path, target: Path) -> Path:
    convert_to_megatron(source, target, dtype=None, workers=2, ranks=Ranks(rank=0, size=1))
    return target


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return a function that calls a tool's main with arguments and returns its exit status and output."""

    def call(main: Callable[[], int], *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
        capsys.readouterr()
        status = main()
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call


@pytest.mark.parametrize("family", FAMILIES)
def test_parity_holds_for_every_family(
    family: str, run: Callable[..., tuple[int, str]], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = toy_model(family, tied=False)
    arguments = ("--hf", model, "--megatron", convert(model, tmp_path / "m"), "--tolerance", 1e-5)
    status, output = run(check_parity.main, *arguments)
    assert status == 0, output
    assert "*" not in output
    rows = [line.split("  ")[0] for line in output.splitlines()[2:-1]]
    assert rows == ["embedding", "layer 0", "layer 1", "final norm", "logits", "log-probabilities"]


@pytest.mark.parametrize(
    ("tensors", "place"),
    [
        (("model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"), "layer 1 feed-forward"),
        (("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"), "layer 0 attention"),
        (("model.embed_tokens.weight", "lm_head.weight"), "embedding layer"),
    ],
    ids=["gates", "keys", "vocabulary"],
)
def test_parity_names_the_module_with_a_wrong_mapping(
    tensors: tuple[str, str],
    place: str,
    run: Callable[..., tuple[int, str]],
    toy_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model = toy_model("qwen2", tied=False)
    wrong = Path(shutil.copytree(model, tmp_path / "wrong"))
    content = load_file(wrong / "model.safetensors")
    first, second = tensors
    content[first], content[second] = content[second], content[first]
    save_file(content, wrong / "model.safetensors", {"format": "pt"})
    (tmp_path / "prompts.txt").write_text("q: 1+1\nq: 2+2 = 4\n")
    prompts = ("--prompts", tmp_path / "prompts.txt")
    status, output = run(check_parity.main, "--hf", model, "--megatron", convert(wrong, tmp_path / "m"), *prompts)
    assert status == 1
    assert output.startswith("16 tokens")
    assert f"The first difference that rounding does not explain is in: {place}." in output


def test_parity_rejects_other_shapes_and_lengths(
    run: Callable[..., tuple[int, str]], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    model, other = toy_model("qwen2", tied=True), convert(toy_model("qwen3"), tmp_path / "m")
    status, output = run(check_parity.main, "--hf", model, "--megatron", other)
    assert status == 2
    assert "models of different shapes: " in output
    status, output = run(check_parity.main, "--hf", model, "--megatron", other, "--length", 10_000)
    assert status == 2
    assert "--length 10000: expected 2 to 512" in output


def test_inspects_hf_and_megatron_checkpoints(
    run: Callable[..., tuple[int, str]], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = toy_model("mistral", tied=False)
    status, output = run(inspect_checkpoint.main, model)
    assert status == 0
    parameters = sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
    for line in ("Hugging Face", "mistral", "2 of width 32", "window of 8 from layer 0", f"{parameters:,} in 21"):
        assert line in output
    status, output = run(inspect_checkpoint.main, convert(model, tmp_path / "m"))
    assert status == 0
    for line in ("torch_dist", "mistral", f"{parameters:,} in", "optimizer     none", "checksums of 21 tensors"):
        assert line in output
    status, output = run(inspect_checkpoint.main, tmp_path)
    assert status == 1
    assert "Only safetensors checkpoints are supported" in output


def test_inspects_a_training_checkpoint(
    run: Callable[..., tuple[int, str]], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = toy_model("qwen2", tied=True)
    config = write_config(tmp_path, model)
    assert train(["--config", str(config), "run.num_steps=1"]) == 0
    (checkpoint,) = tmp_path.glob("**/checkpoints/step_*")
    status, output = run(inspect_checkpoint.main, checkpoint)
    assert status == 0
    parameters = sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
    for line in ("qwen2", f"{parameters:,} in", "tensors, ", "step          1", "no model parallelism"):
        assert line in output
    assert "optimizer     none" not in output


def test_a_model_of_real_size_is_converted_and_restored(tmp_path: Path) -> None:
    """The shapes are those of Qwen2.5-1.5B; the tool fails unless the tensors are restored bit for bit."""
    results = tmp_path / "measured.json"
    command = [sys.executable, "tools/bench/convert.py", "--models", "qwen2.5-1.5b", "--rounds", "1"]
    done = subprocess.run([*command, "--json", str(results)], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    measured = json.loads(results.read_text())["qwen2.5-1.5b"]
    assert measured["bytes"] > 3e9
    for direction in ("HF to Megatron", "Megatron to HF"):
        assert all(round_["peak_rss_bytes"] < 2e9 for round_ in measured[direction])


def test_the_documented_example_of_a_new_family_works(
    run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Run the code of docs/conversion.md unchanged."""
    from transformers import SeedOssConfig, SeedOssForCausalLM

    (code,) = re.findall(r"```python\n(.+?)```", (ROOT / "docs/conversion.md").read_text(), re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    monkeypatch.setitem(FAMILIES_BY_NAME, "SeedOssForCausalLM", namespace["spec"])
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 61}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128}
    config = SeedOssConfig(**sizes, **heads, attention_dropout=0.0, residual_dropout=0.0, pad_token_id=0)
    model = SeedOssForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "hf")
    megatron = convert(tmp_path / "hf", tmp_path / "m")
    status, output = run(check_parity.main, "--hf", tmp_path / "hf", "--megatron", megatron, "--tolerance", 1e-5)
    assert status == 0, output
