"""The layout table, Hugging Face folders and model configs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rl.data.templates import load_tokenizer
from megatron_rl.errors import ConversionError
from megatron_rl.models import layout_table, read_model_spec
from megatron_rl.models.table import ignored_names
from megatron_rl.weights.export import plan_export
from megatron_rl.weights.hf_files import HFReader, check_against_table, write_hf_folder
from megatron_rl.weights.layout import Place, box_index, fill_shard, hf_shapes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral", "qwen3_moe", "mixtral"])
def test_shards_hold_every_element_once(family: str, tied: bool, tp_size: int, toy_model: Callable[..., Path]) -> None:
    folder = toy_model(family, tied=tied)
    hf, spec = load_file(folder / "model.safetensors"), read_model_spec(folder)
    table = layout_table(spec, tp_size)
    assert hf_shapes(table) == {name: tuple(tensor.shape) for name, tensor in hf.items()}
    back = {name: torch.full_like(tensor, float("nan")) for name, tensor in hf.items()}
    for layout in table.values():
        for rank in range(tp_size):
            shard = torch.zeros(layout.shape(tp_size))
            fill_shard(shard, layout.slices(rank, tp_size), lambda name, index: hf[name][index])
            for piece in layout.slices(rank, tp_size):
                back[piece.hf_name][box_index(piece.hf_box)] = shard[box_index(piece.shard_box)]
    assert all(torch.equal(back[name], hf[name]) for name in hf)


def test_elements_that_no_rank_holds_are_reported(toy_model: Callable[..., Path]) -> None:
    table = layout_table(read_model_spec(toy_model("qwen2")), 2)
    names = list(table)
    places = [Place(tp_rank=rank, tp_size=2, etp_rank=rank, etp_size=2) for rank in range(2)]
    assert plan_export([(names, places[0]), (names, places[1])], table)
    with pytest.raises(ConversionError, match=r"model\.embed_tokens\.weight: the ranks hold"):
        plan_export([(names, places[0])], table)


def test_an_indivisible_tensor_parallel_size_is_rejected(toy_model: Callable[..., Path]) -> None:
    layout = layout_table(read_model_spec(toy_model("qwen2")), 4)["decoder.layers.0.self_attention.linear_qkv.weight"]
    with pytest.raises(ConversionError, match="is not divisible by tensor parallel size 4"):
        layout.slices(0, 4)


class TestFolders:
    @pytest.fixture
    def folder(self, toy_model: Callable[..., Path], tmp_path: Path) -> Path:
        tensors = load_file(toy_model("qwen2", tied=False) / "model.safetensors")
        write_hf_folder(tmp_path / "hf", tensors.items(), like=toy_model("qwen2", tied=False), max_shard_bytes=20_000)
        return tmp_path / "hf"

    def check(self, folder: Path) -> None:
        spec = read_model_spec(folder)
        check_against_table(HFReader(folder), hf_shapes(layout_table(spec, 1)), ignored_names(spec))

    def test_a_sharded_folder_is_read_by_transformers(self, folder: Path, toy_model: Callable[..., Path]) -> None:
        from transformers import AutoModelForCausalLM

        assert len(list(folder.glob("*.safetensors"))) > 2
        self.check(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        expected = load_file(toy_model("qwen2", tied=False) / "model.safetensors")
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
        assert load_tokenizer(str(folder)).eos_token == "<eos>"

    def test_existing_files_are_not_overwritten(self, folder: Path) -> None:
        with pytest.raises(ConversionError, match="exists already"):
            write_hf_folder(folder, [], like=folder)

    def test_a_truncated_shard_is_reported(self, folder: Path) -> None:
        victim = sorted(folder.glob("*.safetensors"))[1]
        victim.write_bytes(victim.read_bytes()[:-100])
        with pytest.raises(ConversionError, match=f"{victim.name} is truncated"):
            self.check(folder)

    def test_a_missing_shard_is_reported(self, folder: Path) -> None:
        victim = sorted(folder.glob("*.safetensors"))[1]
        victim.unlink()
        with pytest.raises(ConversionError, match=f"{victim.name} is missing"):
            self.check(folder)

    def test_a_wrong_index_is_reported(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        files = sorted(set(content["weight_map"].values()))
        name = next(n for n, f in content["weight_map"].items() if f == files[0])
        content["weight_map"][name] = files[1]
        index.write_text(json.dumps(content))
        with pytest.raises(ConversionError, match=f"says that {name} is in"):
            self.check(folder)

    @pytest.mark.parametrize("fault", ["missing", "unmapped", "misshapen"])
    def test_tensors_that_do_not_fit_the_config_are_reported(
        self, fault: str, toy_model: Callable[..., Path], tmp_path: Path
    ) -> None:
        source = toy_model("qwen2")
        tensors = load_file(source / "model.safetensors")
        name = "model.layers.1.mlp.up_proj.weight"
        if fault == "missing":
            del tensors[name]
        elif fault == "unmapped":
            tensors["model.layers.7.extra.weight"] = torch.zeros(2)
            name = "model.layers.7.extra.weight"
        else:
            tensors[name] = tensors[name][:, :8].contiguous()
        (tmp_path / "config.json").write_text((source / "config.json").read_text())
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ConversionError, match=name):
            self.check(tmp_path)

    def test_a_missing_folder_weights_or_config_is_reported(self, tmp_path: Path) -> None:
        with pytest.raises(ConversionError, match="does not exist"):
            HFReader(tmp_path / "nowhere")
        with pytest.raises(ConversionError, match=r"neither model\.safetensors nor"):
            HFReader(tmp_path)
        with pytest.raises(ConversionError, match=r"config\.json"):
            read_model_spec(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported. Supported: Qwen2ForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"layer_types": ["sliding_attention"] * 2}, "expected full attention below layer 2"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 4.0}}, "rope type 'dynamic'"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_unsupported_configs_are_rejected(
    change: dict[str, object], message: str, toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    config = json.loads((toy_model("qwen2") / "config.json").read_text()) | change
    if change.get("hidden_size", 0) is None:
        del config["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=message):
        read_model_spec(tmp_path)
