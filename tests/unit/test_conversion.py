"""Conversion without Megatron: round trips, bad input, interruption."""

import contextlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rl.conversion.cli import parse_bytes
from megatron_rl.conversion.partial_folder import check_free_disk
from megatron_rl.conversion.ranks import Ranks
from megatron_rl.conversion.record import read_record
from megatron_rl.conversion.to_hf import convert_to_hf
from megatron_rl.conversion.to_megatron import convert_to_megatron
from megatron_rl.conversion.verify import verify
from megatron_rl.data.templates import load_tokenizer
from megatron_rl.errors import ConversionError
from megatron_rl.models import layout_table, read_model_spec
from megatron_rl.models.toy import FAMILIES
from megatron_rl.weights.hf_files import HFReader, write_hf_folder
from megatron_rl.weights.layout import check_each_once
from megatron_rl.weights.megatron_files import MegatronReader
from megatron_rl.weights.open import find_model_folder
from tests import forked

ROOT = Path(__file__).parents[2]
ALONE = Ranks(rank=0, size=1)
UNIT = 20_000  # bytes; tiny models then have many units of work


def to_megatron(source: Path, target: Path, dtype: torch.dtype | None = None) -> Path:
    convert_to_megatron(source, target, dtype=dtype, workers=2, ranks=ALONE, unit_bytes=UNIT)
    return target


def to_hf(
    source: Path, target: Path, like: Path | None = None, dtype: torch.dtype | None = None, shard: int = 30_000
) -> Path:
    convert_to_hf(
        source,
        target,
        like=like or source,
        dtype=dtype,
        max_shard_bytes=shard,
        workers=2,
        ranks=ALONE,
        unit_bytes=UNIT,
    )
    return target


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(first: Path, second: Path) -> bool:
    a, b = tensors_of(first), tensors_of(second)
    return set(a) == set(b) and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(toy_model: Callable[..., Path], tmp_path: Path) -> Path:
    """Return a fresh model folder in several shards, which a test may damage."""
    model = toy_model("qwen2", tied=False)
    write_hf_folder(tmp_path / "hf", load_file(model / "model.safetensors").items(), like=model, max_shard_bytes=30_000)
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    return tmp_path / "hf"


@pytest.fixture
def converted(source: Path, tmp_path: Path) -> Path:
    return to_megatron(source, tmp_path / "megatron")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_is_bit_identical(family: str, tied: bool, toy_model: Callable[..., Path], tmp_path: Path) -> None:
    model = toy_model(family, tied=tied)
    before = files_of(model)
    back = to_hf(to_megatron(model, tmp_path / "m"), tmp_path / "h")
    assert same(model, back)
    assert files_of(model) == before
    others = {name for name in before if not name.endswith(".safetensors")}
    assert set(files_of(back)) >= others


def test_an_exported_folder_is_complete_and_loads_in_transformers(
    source: Path, converted: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    back = to_hf(converted, tmp_path / "back")
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors_of(source).values())
    assert len(set(index["weight_map"].values())) > 2
    model = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    expected = tensors_of(source)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert load_tokenizer(str(back)).eos_token == "<eos>"
    for name in ("generation_config.json", "chat_template.jinja", "config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()


def test_dtypes_change_only_with_the_dtype_argument(source: Path, converted: Path, tmp_path: Path) -> None:
    half = to_megatron(source, tmp_path / "half", torch.bfloat16)
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    exported = tensors_of(to_hf(half, tmp_path / "half_hf"))
    assert all(torch.equal(exported[n], t.bfloat16()) for n, t in tensors_of(source).items())
    wide = tensors_of(to_hf(half, tmp_path / "wide", dtype=torch.float32))
    assert all(torch.equal(wide[n], t.bfloat16().float()) for n, t in tensors_of(source).items())


def test_mixed_dtypes_survive_a_round_trip(source: Path, tmp_path: Path) -> None:
    tensors = {n: t.bfloat16() if "proj" in n else t for n, t in tensors_of(source).items()}
    mixed = tmp_path / "mixed"
    write_hf_folder(mixed, tensors.items(), like=source)
    assert same(mixed, to_hf(to_megatron(mixed, tmp_path / "m"), tmp_path / "h", shard=10**9))


def test_slices_equal_those_of_the_whole_tensor(converted: Path, source: Path) -> None:
    reader = MegatronReader(converted, layout_table(read_model_spec(source), 1))
    rng = random.Random(0)
    for name, whole in tensors_of(source).items():
        for _ in range(5):
            index = tuple(slice(*sorted(rng.sample(range(size + 1), 2))) for size in whole.shape)
            assert torch.equal(reader.read(name, index), whole[index])
        assert torch.equal(HFReader(source).read(name, index), whole[index])


def test_verification_detects_one_changed_bit(source: Path, converted: Path) -> None:
    table = layout_table(read_model_spec(source), 1)

    def check() -> None:
        target = MegatronReader(converted, table)
        verify(HFReader(source), target, read_record(converted), dtype=None, workers=2, ranks=ALONE)

    check()
    victim = converted / "release" / "__3_0.distcp"
    content = bytearray(victim.read_bytes())
    content[2000] ^= 1  # in the data of the first tensor
    victim.write_bytes(content)
    with pytest.raises(ConversionError, match="differs from"):
        check()


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = tensors_of(folder)
    edit(tensors)
    for file in folder.glob("model*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")


def damage(path: Path, keep: int | None = None, put: bytes = b"") -> None:
    content = path.read_bytes()
    path.write_bytes(put + content[len(put) : keep])


def shard(folder: Path, number: int = 1) -> Path:
    return sorted(folder.glob("*.safetensors"))[number]


def move_in_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = min(index["weight_map"].values())
    path.write_text(json.dumps(index))


def forget_in_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))


def repeat_in_another_shard(folder: Path) -> None:
    tensors = load_file(shard(folder, 2))
    save_file({**load_file(shard(folder, 0)), **dict([next(iter(tensors.items()))])}, shard(folder, 0))


UP = "model.layers.1.mlp.up_proj.weight"
HEAD = "lm_head.weight"
BAD_HF: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda f: shard(f).unlink(), r"model-00002-of-\d+\.safetensors is missing"),
    "truncated shard": (lambda f: damage(shard(f), keep=-50), r"model-00002-of-\d+\.safetensors is truncated"),
    "damaged header": (
        lambda f: damage(shard(f), put=b"\xff" * 12),
        r"model-00002-of-\d+\.safetensors is truncated or",
    ),
    "index names another file": (move_in_index, r"says that model\.norm\.weight is in"),
    "index does not name a tensor": (forget_in_index, r"does not name model\.norm\.weight"),
    "index is no JSON": (lambda f: damage(f / "model.safetensors.index.json", keep=40), "index.json is damaged"),
    "tensor in two files": (repeat_in_another_shard, r"tensor \S+ is in model-00001\S+ and in model-00003"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "neither model.safetensors nor"),
    "other shape than config": (
        lambda f: edit_config(f, intermediate_size=96),
        r"has shape \(.*, but config.json says",
    ),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(UP)), rf"1 tensors are missing, first {UP}"),
    "unmapped tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.layers.9.x.weight": torch.zeros(2)})),
        r"are not part of this architecture, first model\.layers\.9\.x\.weight",
    ),
    "unsupported architecture": (
        lambda f: edit_config(f, architectures=["MambaForCausalLM"]),
        "MambaForCausalLM is not supported. Supported: Qwen2ForCausalLM.*MixtralForCausalLM",
    ),
    "tied, but the head differs": (lambda f: edit_config(f, tie_word_embeddings=True), f"{HEAD} differs from"),
    "not tied, but no head": (
        lambda f: edit_tensors(f, lambda t: t.pop(HEAD)),
        rf"first {HEAD}.*config\.json must say tie_word_embeddings=true",
    ),
    "types that cannot be joined": (
        lambda f: edit_tensors(f, lambda t: t.update({UP: t[UP].half()})),
        rf"{UP} become one Megatron parameter, but have types.*Give --dtype",
    ),
    "config is no JSON": (lambda f: damage(f / "config.json", keep=30), "config.json is not JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "holds a list, expected an object"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
    "no folder": (shutil.rmtree, "No such file"),
}


@pytest.mark.parametrize("name", BAD_HF)
def test_damaged_hugging_face_folders_are_rejected(name: str, source: Path, tmp_path: Path) -> None:
    corrupt, message = BAD_HF[name]
    corrupt(source)
    with pytest.raises(ConversionError, match=message):
        to_megatron(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def drop_file_of_a_rank(folder: Path) -> None:
    (folder / "release" / "__2_0.distcp").unlink()


def forget_a_chunk(folder: Path) -> None:
    path = folder / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    del metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks[1]
    path.write_bytes(pickle.dumps(metadata))


def rename_key(folder: Path) -> None:
    path = folder / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata["decoder.strange.weight"] = metadata.state_dict_metadata["output_layer.weight"]
    for index, info in list(metadata.storage_data.items()):
        if index.fqn == "output_layer.weight":
            metadata.storage_data[type(index)("decoder.strange.weight", index.offset, index.index)] = info
    path.write_bytes(pickle.dumps(metadata))


BAD_MEGATRON: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file of a rank": (drop_file_of_a_rank, r"__2_0\.distcp is missing.*files of every rank"),
    "truncated file": (
        lambda f: damage(f / "release/__2_0.distcp", keep=-2000),
        r"__2_0\.distcp has \d+ bytes, expected",
    ),
    "damaged file": (
        lambda f: damage(f / "release/__2_0.distcp", put=b"\0" * 3000),
        r"__2_0\.distcp: no saved tensor at",
    ),
    "no metadata": (lambda f: (f / "release/.metadata").unlink(), r"names release, but .*\.metadata is missing"),
    "damaged metadata": (lambda f: damage(f / "release/.metadata", keep=100), r"\.metadata cannot be read"),
    "a part is not stored": (forget_a_chunk, r"only 2048 of 4096 elements of decoder\.layers\.mlp\.linear_fc2\.weight"),
    "unmapped tensor": (rename_key, r"not part of the architecture.*decoder\.strange\.weight"),
    "other width than config": (lambda f: edit_config(f, intermediate_size=96), r"linear_fc1\.weight has shape"),
    "fewer layers in config": (
        lambda f: edit_config(f, num_hidden_layers=1, layer_types=["full_attention"]),
        "has 2 layers or experts, config.json says 1",
    ),
    "more layers in config": (
        lambda f: edit_config(f, num_hidden_layers=3, layer_types=["full_attention"] * 3),
        "config.json and the checkpoint do not",
    ),
    "tied, but there is a head": (
        lambda f: edit_config(f, tie_word_embeddings=True),
        r"output_layer\.weight; with tie_word_embeddings=true there is none",
    ),
    "other biases in config": (
        lambda f: edit_config(f, architectures=["LlamaForCausalLM"]),
        r"first decoder\.layers\.self_attention\.linear_qkv\.bias",
    ),
    "no tracker": (lambda f: (f / "latest_checkpointed_iteration.txt").unlink(), "is not a Megatron checkpoint"),
}


@pytest.mark.parametrize("name", BAD_MEGATRON)
def test_damaged_megatron_checkpoints_are_rejected(name: str, converted: Path, tmp_path: Path) -> None:
    corrupt, message = BAD_MEGATRON[name]
    corrupt(converted)
    with pytest.raises(ConversionError, match=message):
        to_hf(converted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_head_is_reported_if_the_config_is_untied(toy_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = to_megatron(toy_model("qwen2", tied=True), tmp_path / "m")
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(ConversionError, match=r"output_layer\.weight is missing.*tie_word_embeddings=true"):
        to_hf(folder, tmp_path / "out")


def test_a_tied_folder_may_also_store_the_head(toy_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "hf"
    shutil.copytree(toy_model("qwen2", tied=True), source)
    edit_tensors(source, lambda t: t.update({HEAD: t["model.embed_tokens.weight"].clone()}))
    back = to_hf(to_megatron(source, tmp_path / "m"), tmp_path / "h")
    assert same(back, toy_model("qwen2", tied=True))


def test_a_table_that_maps_a_tensor_twice_is_rejected(source: Path) -> None:
    table = layout_table(read_model_spec(source), 1)
    check_each_once(table)
    layer = "decoder.layers.{}.mlp.linear_fc2.weight"
    with pytest.raises(ConversionError, match=r"layers\.0\.mlp\.down_proj\.weight has 2048 .* maps 4096: some twice"):
        check_each_once({**table, layer.format(7): table[layer.format(0)]})


def test_the_target_must_be_empty(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    to_megatron(source, tmp_path / "out")  # an empty folder is accepted
    kept = files_of(tmp_path / "out")
    for convert in (lambda: to_megatron(source, tmp_path / "out"), lambda: to_hf(tmp_path / "out", source)):
        with pytest.raises(ConversionError, match="exists and is not empty"):
            convert()
    assert files_of(tmp_path / "out") == kept


def test_too_little_free_disk_is_reported(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_free_disk(tmp_path / "a" / "b", free // 2)
    with pytest.raises(ConversionError, match=r"needs .* GB, but its disk has .* GB free"):
        check_free_disk(tmp_path / "a" / "b", 2 * free)


def in_child(work: Callable[..., object], *arguments: object, kill_when: Callable[[], bool] | None = None) -> int:
    """Run `work` in a process of its own and return its exit status, negative if a signal ended it."""
    process = forked.call(work, *arguments)
    if kill_when is not None:
        while process.poll() is None and not kill_when():
            time.sleep(0.0005)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    return process.wait()


def num_recorded(target: Path) -> int:
    """Return the number of work units that a conversion has recorded so far."""
    count = 0
    for path in target.with_name(f"{target.name}.partial").glob("journal/*.jsonl"):
        with contextlib.suppress(FileNotFoundError):  # the conversion has finished and removed it
            count += path.read_bytes().count(b"\n")
    return count


def hf_to_megatron(hf: Path, megatron: Path, target: Path) -> Path:
    return to_megatron(hf, target)


def megatron_to_hf(hf: Path, megatron: Path, target: Path) -> Path:
    return to_hf(megatron, target)


DIRECTIONS = {"to Megatron": hf_to_megatron, "to Hugging Face": megatron_to_hf}


@pytest.fixture
def larger(toy_model: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """Return a model folder and its Megatron checkpoint, large enough to interrupt the conversion of either."""
    model = toy_model("qwen3_moe", tied=False, num_hidden_layers=6, num_experts=16)
    return model, to_megatron(model, tmp_path / "larger")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_conversion_killed_twenty_times_completes_when_run_again(
    direction: str, larger: tuple[Path, Path], tmp_path: Path
) -> None:
    target, reference = tmp_path / "out", tmp_path / "reference"
    convert = DIRECTIONS[direction]
    assert in_child(convert, *larger, reference) == 0
    rng, killed = random.Random(0), 0
    while killed < 20:
        enough = num_recorded(target) + rng.randint(1, 4)

        def is_far_enough(enough: int = enough) -> bool:
            if num_recorded(target) < enough:
                return False
            time.sleep(rng.uniform(0, 0.01))
            return True

        status = in_child(convert, *larger, target, kill_when=is_far_enough)
        assert status in (0, -signal.SIGKILL)
        if target.exists():  # it is complete, even if the process was killed while it exited
            assert files_of(target) == files_of(reference)
            shutil.rmtree(target)
        else:
            killed += 1
    convert(*larger, target)
    assert files_of(target) == files_of(reference)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_conversion_completes_after_a_failed_write(direction: str, larger: tuple[Path, Path], tmp_path: Path) -> None:
    """As on a full disk, a file cannot grow any further."""
    target, reference = tmp_path / "out", tmp_path / "reference"
    convert = DIRECTIONS[direction]
    convert(*larger, reference)
    assert in_child(run_with_size_limit, reference, convert, *larger, target) == 1
    message = (tmp_path / "error.txt").read_text()
    assert "cannot write" in message
    assert "run the same command again" in message
    assert not target.exists()
    convert(*larger, target)
    assert files_of(target) == files_of(reference)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_files_damaged_after_an_interruption_are_written_again(
    direction: str, larger: tuple[Path, Path], tmp_path: Path
) -> None:
    """As after a power failure, files have their full length, but not all of their bytes."""
    target, reference = tmp_path / "out", tmp_path / "reference"
    convert = DIRECTIONS[direction]
    convert(*larger, reference)
    assert in_child(run_with_size_limit, reference, convert, *larger, target) == 1
    written = [path for path in (tmp_path / "out.partial").rglob("*") if path.suffix in (".distcp", ".safetensors")]
    assert written
    for path in written:
        content = bytearray(path.read_bytes())
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
        path.write_bytes(content)
    convert(*larger, target)
    assert files_of(target) == files_of(reference)


def run_with_size_limit(reference: Path, work: Callable[..., object], *arguments: object) -> None:
    """Run `work` with a limit on file sizes, one byte below the largest file of the folder `reference`."""
    limit = max(path.stat().st_size for path in reference.rglob("*") if path.is_file()) - 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        work(*arguments)
    except ConversionError as error:
        reference.with_name("error.txt").write_text(str(error))
        raise


def test_a_partial_folder_of_another_conversion_is_rejected(larger: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(ConversionError, match="damaged"):
        to_hf_of_damaged(larger[1], target)
    assert target.with_name("out.partial").exists()
    with pytest.raises(ConversionError, match=r"out\.partial is left from an interrupted conversion of another input"):
        to_hf(larger[1], target, dtype=torch.bfloat16)


def to_hf_of_damaged(folder: Path, target: Path) -> None:
    victim = max((folder / "release").glob("__*"), key=lambda path: path.stat().st_size)
    damage(victim, put=b"\0" * 500)
    to_hf(folder, target)


def test_a_second_conversion_to_the_same_folder_is_rejected(larger: tuple[Path, Path], tmp_path: Path) -> None:
    from megatron_rl.conversion.partial_folder import PartialFolder

    held = PartialFolder(tmp_path / "out", {}, ALONE)
    with pytest.raises(ConversionError, match="is being written by another conversion"):
        to_megatron(larger[0], tmp_path / "out")
    assert held.folder.exists()


def tool(name: str, *arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "tools" / name), *map(str, arguments)]
    return forked.run(command)


def test_the_commands_convert_both_ways_on_one_and_two_ranks(larger: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = larger
    megatron, back = tmp_path / "m", tmp_path / "h"
    for ranks in (1, 2):
        shutil.rmtree(megatron, ignore_errors=True)
        done = tool("convert_hf_to_megatron.py", "--input", model, "--output", megatron, "--verify", ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert "GB/s" in done.stdout
        alone = files_of(megatron) if ranks == 1 else alone  # noqa: F821
        assert files_of(megatron) == alone
    done = tool("convert_megatron_to_hf.py", "--input", megatron, "--output", back, "--verify", ranks=2)
    assert done.returncode == 0, done.stderr
    assert same(model, back)
    repeated = tool("convert_megatron_to_hf.py", "--input", megatron, "--output", back, ranks=2)
    assert repeated.returncode != 0
    assert f"error: {back} exists and is not empty" in repeated.stderr
    bad_size = tool("convert_megatron_to_hf.py", "--input", megatron, "--output", back, "--max-shard-size", "many")
    assert bad_size.returncode == 2
    assert "expected one such as 5GB" in bad_size.stderr


def test_sizes_are_parsed_and_the_model_of_a_run_is_found(source: Path, converted: Path, tmp_path: Path) -> None:
    assert parse_bytes("5GB") == 5 * 10**9
    assert parse_bytes("1.5 MiB") == 3 * 2**19
    assert find_model_folder(converted) == converted
    step = tmp_path / "checkpoints" / "step_000003"
    (step / "policy").mkdir(parents=True)
    with pytest.raises(ConversionError, match=r"no config\.json.*--config"):
        find_model_folder(step)
    (step / "trainer.json").write_text(json.dumps({"config": {"model.path": str(source)}}))
    assert find_model_folder(step) == find_model_folder(step / "policy") == source
