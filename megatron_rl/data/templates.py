"""Tokenizers and chat templates."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rl.config.data import DataSection
from megatron_rl.data.adapters import Problem
from megatron_rl.errors import DataError

GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")


def load_tokenizer(folder: str) -> Any:
    """The tokenizer of a Hugging Face folder.

    Raises:
        DataError: there is none, or it has no end token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not Path(folder).is_dir():
        raise DataError(
            f"tokenizer folder {folder} does not exist. model.path must be a Hugging Face checkpoint folder."
        )
    try:
        # AutoTokenizer goes by the model type and would replace such a tokenizer.json by the family's own rules
        kind = PreTrainedTokenizerFast if _named_class(folder) in GENERIC_CLASSES else AutoTokenizer
        tokenizer = kind.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} has no usable tokenizer: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer of {folder} has no end token, so responses would never stop. "
            "Set eos_token in its tokenizer_config.json."
        )
    return tokenizer


def _named_class(folder: str) -> str | None:
    path = Path(folder) / "tokenizer_config.json"
    if not path.exists():
        return None
    named = json.loads(path.read_text()).get("tokenizer_class")
    return str(named) if named else None


def render_prompts(problems: Sequence[Problem], config: DataSection, tokenizer: Any) -> list[str]:
    """The text of every prompt, with chat template and system prompt where they apply.

    Raises:
        DataError: messages or a system prompt without a chat template.
    """
    use_template = config.chat_template == "auto" and tokenizer.chat_template is not None
    if use_template:
        return [in_chat(problem.prompt, tokenizer, system_prompt=config.system_prompt) for problem in problems]
    if config.system_prompt is not None:
        raise DataError(
            "data.system_prompt needs a chat template, and the tokenizer has none (or data.chat_template is not auto)."
        )
    texts = []
    for problem in problems:
        if not isinstance(problem.prompt, str):
            raise DataError("prompts are lists of messages, but the tokenizer has no chat template. Use text prompts.")
        texts.append(problem.prompt)
    return texts


def in_chat(prompt: str | Sequence[Mapping[str, Any]], tokenizer: Any, *, system_prompt: str | None = None) -> str:
    """The text of a prompt by the tokenizer's chat template, up to where the assistant begins.

    Args:
        prompt: what the user says, or messages.
        system_prompt: stands before them, unless they begin with one of their own.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def adds_special_tokens(chat_template: str, tokenizer: Any) -> bool:
    """The tokenizer has to add its start token; a chat template has written it already."""
    return chat_template == "none" or tokenizer.chat_template is None


def tokenize(texts: Sequence[str], tokenizer: Any, *, special_tokens: bool) -> list[list[int]]:
    """Token ids of every text.

    Args:
        special_tokens: let the tokenizer add its start token.
    """
    return tokenizer(list(texts), add_special_tokens=special_tokens)["input_ids"]
