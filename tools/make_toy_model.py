"""Write a tiny random model with a character tokenizer: python tools/make_toy_model.py --output DIR.

The folder is an ordinary Hugging Face checkpoint; the quickstart and the tests start from one.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CHARACTERS = "0123456789+-*/=()[]<>,.:;?! \nabcdefghijklmnopqrstuvwxyz"
FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
}

FIELDS: dict[str, dict[str, int | bool]] = {
    "mistral": {"sliding_window": 8},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; anything else is unknown."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def make_model(family: str = "qwen2", *, seed: int = 0, tied: bool = True, **sizes: int) -> PreTrainedModel:
    """A random model; ``sizes`` replace fields of its configuration."""
    config_class, model_class = FAMILIES[family]
    fields = {
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "max_position_embeddings": 512,
        **FIELDS.get(family, {}),
        **sizes,
    }
    torch.manual_seed(seed)
    config = config_class(**fields, tie_word_embeddings=tied, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    return model_class(config)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write a tiny random model with a character tokenizer.")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--family", choices=FAMILIES, default="qwen2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--untied", action="store_true", help="an output layer of its own")
    for size in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"):
        parser.add_argument("--" + size.replace("_", "-"), type=int)
    arguments = parser.parse_args()
    sizes = {
        name: value
        for name, value in vars(arguments).items()
        if name not in ("output", "family", "seed", "untied") and value is not None
    }
    model = make_model(arguments.family, seed=arguments.seed, tied=not arguments.untied, **sizes)
    model.save_pretrained(arguments.output)
    make_tokenizer().save_pretrained(arguments.output)
    print(f"{arguments.output}: {arguments.family}, {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
