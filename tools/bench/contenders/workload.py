"""The work of a step, which is the same for every contender, and the folder of model, tokenizer and prompts."""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BETAS = (0.9, 0.95)
CLIP_GRAD = 1.0
STD_EPSILON = 1e-4

SIZES: dict[str, dict[str, Any]] = {
    "127k": {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "1m": {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "10m": {
        "vocab_size": 1024,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One step: ``num_prompts * group_size`` sampled responses of exactly ``new_tokens`` tokens, then one update."""

    folder: str
    """Folder of the model, the tokenizer and prompts.jsonl."""
    threads: int
    new_tokens: int
    num_prompts: int = 16
    group_size: int = 8
    lr: float = 1e-4
    seed: int = 0

    @property
    def num_sequences(self) -> int:
        return self.num_prompts * self.group_size

    @property
    def prompts_file(self) -> Path:
        return Path(self.folder) / "prompts.jsonl"

    def prompts(self) -> list[str]:
        """Prompt texts of equal length; each character is a token."""
        return [json.loads(line)["prompt"] for line in self.prompts_file.read_text().splitlines()]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Workload":
        return Workload(**json.loads(text))


def write_inputs(folder: Path, size: str, seed: int) -> None:
    """Write a random Qwen2, its tokenizer and prompts.

    The end token is outside of the model's vocabulary, so that it is never sampled and all lengths are exact. This is
    the same for every contender and costs none of them time.
    """
    from megatron_rl.models.toy import make_model, make_tokenizer

    sizes = SIZES[size]
    model, tokenizer = make_model("qwen2", seed=seed, **sizes), make_tokenizer()
    end = sizes["vocab_size"]
    tokenizer.add_tokens([f"<{number}>" for number in range(len(tokenizer), end)])
    tokenizer.add_special_tokens({"eos_token": "<never>"})  # its id is the next one, ``end``
    for config in (model.config, model.generation_config):
        config.eos_token_id = end
        config.pad_token_id = None  # transformers drops the gradient of the pad token, which is sampled here
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    draw = random.Random(seed)
    rows = [json.dumps({"prompt": f"{draw.randint(10, 99)}+{draw.randint(10, 99)}="}) for _ in range(512)]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
