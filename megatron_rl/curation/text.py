"""Normalization of texts before they are compared."""

import re


def words(text: str) -> list[str]:
    """Split a text into lower-case words and numbers, without punctuation and white space."""
    return re.findall(r"\w+", text.lower())


def as_text(prompt: object) -> str:
    """Return the text of a prompt: the prompt itself, or the contents of its messages without system messages."""
    if isinstance(prompt, str):
        return prompt
    assert isinstance(prompt, list | tuple)
    return "\n".join(str(message["content"]) for message in prompt if message["role"] != "system")
