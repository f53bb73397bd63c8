"""Megatron distributed checkpoint -> complete Hugging Face folder.

python tools/convert_megatron_to_hf.py --input DIR --output HF_DIR [--config HF_DIR] [--verify]
torchrun --nproc-per-node 4 tools/convert_megatron_to_hf.py …      shares the work

The input is a folder that convert_hf_to_megatron.py wrote, a checkpoint of a training run
(runs/NAME/checkpoints/step_N), or one that Megatron-LM saved with --ckpt-format torch_dist.
An interrupted conversion is resumed by the same command. docs/conversion.md has the rest.
"""

import sys
from pathlib import Path

from megatron_rl.conversion.cli import DTYPES, common_parser, parse_bytes, run
from megatron_rl.conversion.ranks import Ranks
from megatron_rl.conversion.record import read_record
from megatron_rl.conversion.to_hf import convert_to_hf
from megatron_rl.conversion.verify import verify
from megatron_rl.models import layout_table, read_model_spec
from megatron_rl.weights.hf_files import HFReader
from megatron_rl.weights.megatron_files import MegatronReader
from megatron_rl.weights.open import find_model_folder


def main() -> None:
    """The command line."""
    parser = common_parser("Convert a Megatron distributed checkpoint to a Hugging Face folder.")
    parser.add_argument(
        "--config",
        help="folder with config.json, tokenizer and chat template (default: the input, or the run's model)",
    )
    parser.add_argument("--max-shard-size", type=parse_bytes, default="5GB", help="of a file (default: 5GB)")
    arguments = parser.parse_args()
    source, target, dtype = Path(arguments.input), Path(arguments.output), DTYPES[arguments.dtype]

    def convert(ranks: Ranks) -> None:
        like = Path(arguments.config) if arguments.config else find_model_folder(source)
        convert_to_hf(
            source,
            target,
            like=like,
            dtype=dtype,
            max_shard_bytes=arguments.max_shard_size,
            workers=arguments.workers,
            ranks=ranks,
        )
        if arguments.verify:
            read = MegatronReader(source, layout_table(read_model_spec(like), 1))
            recorded = read_record(target)
            verify(read, HFReader(target), recorded, dtype=dtype, workers=arguments.workers, ranks=ranks)

    sys.exit(run(convert, target))


if __name__ == "__main__":
    main()
