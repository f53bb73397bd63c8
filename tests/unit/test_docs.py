"""README and docs: links resolve, commands parse, configuration keys exist, generated pages are up to date."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
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


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def options_of(script: Path) -> set[str]:
    """Options that a script's source mentions, and those of the parsers that it shares."""
    shared = [ROOT / "megatron_rl/conversion/cli.py"] if "conversion.cli" in script.read_text() else []
    return {
        node.value
        for path in (script, *shared)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("-")
    } | {"--help"}


def options_in_help(script: Path) -> set[str]:
    """Options that ``--help`` lists; slower, for scripts that make option names from others."""
    command = [sys.executable, str(script), "--help"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=True).stdout
    return set(re.findall(r"--[\w-]+", text))


def check(words: list[str]) -> None:
    """Assert that a command would be understood."""
    if words[0] in ("torchrun", "srun"):
        rest = words[1:]
        starts = [i for i, word in enumerate(rest) if word == "-m" or word.endswith(".py") or word == "python"]
        words = ["python", *rest[starts[0] :]] if rest[starts[0]] != "python" else rest[starts[0] :]
    if words[0].endswith("bin/python") or words[0] == "python":
        check_python(words[1:])
    elif words[0] == "make":
        wanted = [word for word in words[1:] if "=" not in word]
        assert set(wanted) <= targets(), words
    elif words[0] == "sbatch" or words[0].startswith("slurm/"):
        script = next(word for word in words if word.startswith("slurm/"))
        assert (ROOT / script).exists(), words
        overrides = [word for word in words[words.index(script) + 1 :] if "=" in word]
        if overrides and Path(script).name in RECIPES:
            load_config(ROOT / "configs/recipes/production" / RECIPES[Path(script).name], overrides)
    elif words[0].startswith("tools/"):
        assert (ROOT / words[0]).exists(), words
    else:
        assert words[0] in SHELL, words


def check_python(words: list[str]) -> None:
    overrides = [word for word in words if re.match(r"^[a-z_]+(\.[a-z_]+)+=", word)]
    config = words[words.index("--config") + 1] if "--config" in words else None
    if words[0] == "-m" and words[1] in ENTRY_POINTS:
        assert config is not None, words
        if not PLACEHOLDER.match(config):
            load = {
                "megatron_rl.train": load_config,
                "megatron_rl.evaluate": load_evaluation,
                "megatron_rl.train_reward_model": lambda path, keys: load_as(RewardTrainingConfig, path, keys),
            }[words[1]]
            load(ROOT / config, overrides)
    elif words[0] == "-m":
        module = words[1]
        assert module in ("pip", "pytest") or (ROOT / f"{module.replace('.', '/')}.py").exists(), words
        assert all((ROOT / word).exists() for word in words[2:] if word.startswith("tests/")), words
    else:
        script = ROOT / words[0]
        assert script.exists(), words
        used = {word.partition("=")[0] for word in words[1:] if word.startswith("--")}
        assert used <= options_of(script) or used <= options_in_help(script), words
        if config is not None and not PLACEHOLDER.match(config) and words[0] != "tools/data/curate.py":
            load_config(ROOT / config, overrides)
        elif words[0] == "tools/data/curate.py" and config is not None:
            load_as(CurationConfig, ROOT / config, overrides)
        if words[0] == "tools/analysis/ablate.py" and not PLACEHOLDER.match(words[1]):
            load_study(ROOT / words[1])


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_commands_are_understood(path: Path) -> None:
    for words in commands(path.read_text()):
        check(words)


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
