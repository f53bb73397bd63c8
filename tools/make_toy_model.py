"""Write a tiny random model with a character tokenizer: python tools/make_toy_model.py --output DIR.

The folder is an ordinary Hugging Face checkpoint. The quickstart and the tests start from it.
"""

import argparse
from pathlib import Path

from megatron_rl.models.toy import FAMILIES, make_model, make_tokenizer


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Write a tiny random model with a character tokenizer.")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--family", choices=FAMILIES, default="qwen2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--untied", action="store_true", help="give the output layer its own weights")
    for size in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"):
        parser.add_argument("--" + size.replace("_", "-"), type=int)
    args = parser.parse_args()
    sizes = {
        name: value
        for name, value in vars(args).items()
        if name not in ("output", "family", "seed", "untied") and value is not None
    }
    model = make_model(args.family, seed=args.seed, tied=not args.untied, **sizes)
    model.save_pretrained(args.output)
    make_tokenizer().save_pretrained(args.output)
    print(f"{args.output}: {args.family}, {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
