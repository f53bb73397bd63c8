"""README and docs: links resolve, commands parse, configuration keys exist, generated pages are up to date."""

import functools
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_rl.config import load_config
from megatron_rl.config.curation import CurationConfig
from megatron_rl.config.evaluation import load_evaluation
from megatron_rl.config.load import load_as
from megatron_rl.config.reference import field_texts, render, sections
from megatron_rl.config.reward_training import RewardTrainingConfig
from megatron_rl.config.schema import RunConfig
from megatron_rl.config.study import load_study
from megatron_rl.train import main as train
from tests import forked
from tests.limits import LIMIT_S

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), ROOT / "slurm/README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.md")]
)
ENTRY_POINTS = {"megatron_rl.train", "megatron_rl.evaluate", "megatron_rl.train_reward_model"}
SHELL = {"cd", "cp", "git", "pip", "source"}
PLACEHOLDER = re.compile(r"^[A-Z_]+(\.yaml)?$")
RECIPES = {
    "grpo_7b.sh": "grpo-qwen2.5-7b-1n8g-h100-fp8.yaml",
    "grpo_70b.sh": "grpo-llama3.1-70b-8n8g-h100-fp8.yaml",
}


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str) -> Iterator[str]:
    """Fenced blocks without a language and console blocks, indented ones included."""
    language, lines = None, []
    for line in text.splitlines():
        fence = re.match(r"^ *```(\w*)", line)
        if fence is None:
            lines.append(line.strip())
        elif language is None:
            language, lines = fence[1], []
        else:
            if language in ("", "console"):
                yield "\n".join(lines)
            language = None


def commands(text: str) -> Iterator[list[str]]:
    """Words of every command line of a page; optional parts in brackets are taken, comments and ellipses dropped."""
    for block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\[(key=value )?…\]|\[key=value\]", "", line.removeprefix("$ "))
            line = re.sub(r"\[(-?-?[\w.-]+(?:[ =][\w.-]+)?)\]", r"\1", line)
            for part in line.split(" && "):
                try:
                    words = shlex.split(part, comments=True)
                except ValueError:  # program output with a lone quote
                    continue
                while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                    words = words[1:]
                if words and is_command(words[0]):
                    yield words


def is_command(word: str) -> bool:
    return word in {"python", "torchrun", "make", "sbatch", "srun", *SHELL} or word.startswith(
        ("tools/", "slurm/", ".venv/bin/")
    )


def run(*command: str) -> str:
    """Output of a command at the root of the repository, which has to succeed."""
    if command[0] == sys.executable:
        done = forked.run(command)
    else:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@functools.cache
def options_of(script: str) -> set[str]:
    """Options that ``--help`` of a script lists."""
    return set(re.findall(r"--[\w-]+", run(sys.executable, script, "--help")))


class DryRun:
    """Runs a documented command as far as this machine can: without its effects, its GPUs and its downloads."""

    def __init__(self, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._model, self._folder, self._monkeypatch = model, folder, monkeypatch

    def __call__(self, words: list[str]) -> None:
        first, num_ranks = words[0], 1
        if first in ("torchrun", "srun"):
            if "--nproc-per-node" in words:
                num_ranks = int(words[words.index("--nproc-per-node") + 1])
            starts = (i for i, word in enumerate(words) if word == "-m" or word.endswith(".py") or word == "python")
            words = words[next(starts) :]
            words = words[1:] if words[0] == "python" else words
            self._python(words, num_ranks)
        elif first == "python" or first.endswith("bin/python"):
            self._python(words[1:], num_ranks)
        elif first == "make":
            run("make", "--dry-run", "--silent", *words[1:])
        elif first == "sbatch" or first.startswith("slurm/"):
            script = next(word for word in words if word.startswith("slurm/"))
            arguments = [word for word in words[words.index(script) + 1 :] if word != "--dry-run"]
            assert "each rank runs" in run("bash", script, "--dry-run", *arguments)
            if arguments and Path(script).name in RECIPES:
                load_config(ROOT / "configs/recipes/production" / RECIPES[Path(script).name], arguments)
        else:
            assert first in SHELL or (ROOT / first).exists(), words

    def _python(self, words: list[str], num_ranks: int) -> None:
        overrides = [word for word in words if re.match(r"^[a-z_]+(\.[a-z_]+)+=", word)]
        config = words[words.index("--config") + 1] if "--config" in words else None
        is_given = config is not None and not PLACEHOLDER.match(config)
        if words[:2] == ["-m", "megatron_rl.train"] and is_given:
            self._train(str(config), overrides, num_ranks)
        elif words[:2] == ["-m", "megatron_rl.evaluate"] and is_given:
            load_evaluation(ROOT / str(config), overrides)
        elif words[:2] == ["-m", "megatron_rl.train_reward_model"] and is_given:
            load_as(RewardTrainingConfig, ROOT / str(config), overrides)
        elif words[0] == "-m":
            assert words[1] in {"pip", "pytest", *ENTRY_POINTS}, words
            assert all((ROOT / word).exists() for word in words[2:] if word.startswith("tests/")), words
        else:
            self._tool(words, str(config) if is_given else None, overrides)

    def _train(self, config: str, overrides: list[str], num_ranks: int) -> None:
        """Dry-run a training on generated problems, with a toy model; of one on data of the hub load the config."""
        if load_config(ROOT / config, overrides).data.train.kind != "task":
            return
        for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", num_ranks)):
            self._monkeypatch.setenv(name, str(value))
        self._monkeypatch.chdir(ROOT)
        own = [f"model.path={self._model}", f"run.output_dir={self._folder}/run"]
        others = [one for one in overrides if not one.startswith(("model.path=", "run.output_dir="))]
        assert train(["--config", config, "--dry-run", *others, *own]) == 0

    def _tool(self, words: list[str], config: str | None, overrides: list[str]) -> None:
        script = words[0]
        used = {word.partition("=")[0] for word in words[1:] if word.startswith("--")}
        assert used <= options_of(script), words
        if script in ("tools/plan.py", "tools/cluster/plan_weight_sync.py") and (config or "--model" in words):
            run(sys.executable, *words)
        elif script == "tools/data/curate.py" and config is not None:
            load_as(CurationConfig, ROOT / config, overrides)
        elif script == "tools/analysis/ablate.py" and not PLACEHOLDER.match(words[1]):
            load_study(ROOT / words[1])
        else:
            configs = [word for word in words if word.startswith("configs/") and word.endswith(".yaml")]
            for name in configs:
                load_config(ROOT / name, overrides)


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_commands_run_or_dry_run(
    path: Path, toy_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dry_run = DryRun(toy_model("qwen2"), tmp_path, monkeypatch)
    for words in commands(path.read_text()):
        dry_run(words)


def test_the_readme_has_commands_to_check() -> None:
    found = [words[0] for words in commands((ROOT / "README.md").read_text())]
    assert {"make", "python", "torchrun", "sbatch"} <= set(found)


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_links_resolve(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


FILES = {"json", "jsonl", "yaml", "py", "md", "html", "sh", "txt", "log", "safetensors"}
SECTIONS = {prefix for prefix, _ in sections(RunConfig) if prefix and "." not in prefix}
KEYS = {
    f"{prefix}.{name}".lstrip(".").replace("[]", "")
    for root in (RunConfig, RewardTrainingConfig, CurationConfig)
    for prefix, section in sections(root)
    for name in field_texts(section)
}


@pytest.mark.parametrize("path", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=page_id)
def test_configuration_keys_exist(path: Path) -> None:
    """A backticked ``section.key`` of a section of a run is a key."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for section, key in re.findall(r"`([a-z_]+)\.([a-z_.]+)(?=[`=:])", text):
        is_file = key.rsplit(".", 1)[-1] in (
            "json",
            "jsonl",
            "yaml",
            "py",
            "md",
            "html",
            "sh",
            "txt",
            "log",
            "safetensors",
        )
        if section in SECTIONS and not is_file:
            assert f"{section}.{key}" in KEYS, f"{section}.{key}"


def test_the_configuration_reference_is_up_to_date() -> None:
    """``make docs`` writes it."""
    assert (ROOT / "docs/configuration_reference.md").read_text() == render()


def test_every_key_has_a_text() -> None:
    for root in (RunConfig, RewardTrainingConfig, CurationConfig):
        for prefix, section in sections(root):
            for name, text in field_texts(section).items():
                is_section = any(one.startswith(f"{prefix}.{name}".lstrip(".")) for one, _ in sections(root) if one)
                assert text or is_section, f"{prefix}.{name}"
