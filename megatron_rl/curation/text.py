"""Texts as they are compared."""

import re


def words(text: str) -> list[str]:
    """Lower-case words and numbers; what stands between them does not count."""
    return re.findall(r"\w+", text.lower())


def as_text(prompt: object) -> str:
    """What a prompt says: a text, or of messages those that are no system's."""
    if isinstance(prompt, str):
        return prompt
    assert isinstance(prompt, list | tuple)
    return "\n".join(str(message["content"]) for message in prompt if message["role"] != "system")
