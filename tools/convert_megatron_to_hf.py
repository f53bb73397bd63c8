"""Convert a Megatron distributed checkpoint to a complete Hugging Face folder.

python tools/convert_megatron_to_hf.py --input DIR --output HF_DIR [--config HF_DIR] [--verify]
torchrun --nproc-per-node 4 tools/convert_megatron_to_hf.py …      # several processes share the work

The input is an output of convert_hf_to_megatron.py, a checkpoint of a training run (runs/NAME/checkpoints/step_N), or a
checkpoint that Megatron-LM saved with --ckpt-format torch_dist.
The same command resumes an interrupted conversion. See docs/conversion.md.
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
    """Command-line entry point."""
    parser = common_parser("Convert a Megatron distributed checkpoint to a Hugging Face folder.")
    parser.add_argument(
        "--config",
        help="folder with config.json, tokenizer and chat template (default: the input, or the run's model)",
    )
    parser.add_argument(
        "--max-shard-size", type=parse_bytes, default="5GB", help="largest safetensors file (default: 5GB)"
    )
    args = parser.parse_args()
    source, target, dtype = Path(args.input), Path(args.output), DTYPES[args.dtype]

    def convert(ranks: Ranks) -> None:
        like = Path(args.config) if args.config else find_model_folder(source)
        convert_to_hf(
            source,
            target,
            like=like,
            dtype=dtype,
            max_shard_bytes=args.max_shard_size,
            workers=args.workers,
            ranks=ranks,
        )
        if args.verify:
            read = MegatronReader(source, layout_table(read_model_spec(like), 1))
            recorded = read_record(target)
            verify(read, HFReader(target), recorded, dtype=dtype, workers=args.workers, ranks=ranks)

    sys.exit(run(convert, target))


if __name__ == "__main__":
    main()
