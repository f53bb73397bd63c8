#!/usr/bin/env bash
# Evaluate the quickstart's model before and after GRPO on every engine, and compare.
# Usage: tools/quickstart/evaluate_quickstart.sh SEED ENGINE=PYTHON [ENGINE=PYTHON …]
# Run tools/quickstart/quickstart.sh SEED vllm first.
set -euo pipefail
cd "$(dirname "$0")/../.."
seed=$1
trained=runs/quickstart/vllm_seed_$seed # its attention heads have a size that all engines support
# shellcheck disable=SC2034  # read by name
before=$trained/sft/checkpoints/step_001800/hf
# shellcheck disable=SC2034
after=$trained/grpo/checkpoints/step_000100/hf
trained_folders=()
for pair in "${@:2}"; do
    engine=${pair%%=*} python=${pair#*=}
    folder=runs/eval/quickstart/seed_$seed/$engine
    for when in before after; do
        "$python" -m megatron_rl.evaluate --config configs/eval/quickstart.yaml model.path="${!when}" \
            engine.name="$engine" engine.max_num_sequences=64 sampling.num_samples=1 sampling.temperature=0.0 \
            run.output_dir="$folder/$when"
    done
    echo "$engine:"
    "$python" tools/analysis/compare_evals.py "$folder/before" "$folder/after" --html "$folder/comparison.html"
    trained_folders+=("$folder/after")
done
# compare the engines with each other
if ((${#trained_folders[@]} > 1)); then
    "$python" tools/analysis/compare_evals.py "${trained_folders[@]}" --html "runs/eval/quickstart/seed_$seed/engines.html"
fi
