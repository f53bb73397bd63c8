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
    """Load the tokenizer of a Hugging Face folder.

    Raises:
        DataError: the folder has no usable tokenizer, or the tokenizer has no end-of-sequence token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not Path(folder).is_dir():
        raise DataError(
            f"tokenizer folder {folder} does not exist. model.path must be a Hugging Face checkpoint folder."
        )
    try:
        # AutoTokenizer chooses by the model type and would replace the rules in such a tokenizer.json by the family's
        tokenizer_class = PreTrainedTokenizerFast if _named_class(folder) in GENERIC_CLASSES else AutoTokenizer
        tokenizer = tokenizer_class.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} has no usable tokenizer: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer of {folder} has no end-of-sequence token, so responses would never stop. "
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
    """Return the text of every prompt, with the chat template and system prompt applied if configured.

    Raises:
        DataError: a prompt is a list of messages, or a system prompt is set, but no chat template is applied.
    """
    use_template = config.chat_template == "auto" and tokenizer.chat_template is not None
    if use_template:
        return [
            apply_chat_template(problem.prompt, tokenizer, system_prompt=config.system_prompt) for problem in problems
        ]
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


def apply_chat_template(
    prompt: str | Sequence[Mapping[str, Any]], tokenizer: Any, *, system_prompt: str | None = None
) -> str:
    """Return the text of a prompt by the tokenizer's chat template, ending where the assistant's turn begins.

    Args:
        prompt: text of the user's message, or a list of messages.
        system_prompt: system message to prepend, unless the messages begin with one.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def adds_special_tokens(chat_template: str, tokenizer: Any) -> bool:
    """Whether the tokenizer must add its start token, which a chat template already contains."""
    return chat_template == "none" or tokenizer.chat_template is None


def tokenize(texts: Sequence[str], tokenizer: Any, *, special_tokens: bool) -> list[list[int]]:
    """Return the token ids of every text.

    Args:
        special_tokens: whether the tokenizer adds its special tokens, such as a start token.
    """
    return tokenizer(list(texts), add_special_tokens=special_tokens)["input_ids"]
