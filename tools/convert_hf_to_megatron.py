"""Convert a Hugging Face folder to a Megatron distributed checkpoint, which loads under any layout.

python tools/convert_hf_to_megatron.py --input HF_DIR --output DIR [--verify]
torchrun --nproc-per-node 4 tools/convert_hf_to_megatron.py …      # several processes share the work

The same command resumes an interrupted conversion. See docs/conversion.md.
"""

import sys
from pathlib import Path

from megatron_rl.conversion.cli import DTYPES, common_parser, run
from megatron_rl.conversion.ranks import Ranks
from megatron_rl.conversion.record import read_record
from megatron_rl.conversion.to_megatron import convert_to_megatron
from megatron_rl.conversion.verify import verify
from megatron_rl.models import layout_table, read_model_spec
from megatron_rl.weights.hf_files import HFReader
from megatron_rl.weights.megatron_files import MegatronReader


def main() -> None:
    """Command-line entry point."""
    parser = common_parser("Convert a Hugging Face folder to a Megatron distributed checkpoint.")
    args = parser.parse_args()
    source, target, dtype = Path(args.input), Path(args.output), DTYPES[args.dtype]

    def convert(ranks: Ranks) -> None:
        convert_to_megatron(source, target, dtype=dtype, workers=args.workers, ranks=ranks)
        if args.verify:
            written = MegatronReader(target, layout_table(read_model_spec(target), 1))
            recorded = read_record(target)
            verify(HFReader(source), written, recorded, dtype=dtype, workers=args.workers, ranks=ranks)

    sys.exit(run(convert, target))


if __name__ == "__main__":
    main()
