#!/usr/bin/env bash
# Run the quickstart: fine-tune a tiny random model on demonstrations, then train it by GRPO, on 2 ranks.
# Usage: tools/quickstart/quickstart.sh [SEED [ENGINE [sft]]]
# torchrun and python of the environment must be on PATH. With sft it stops after the fine-tuning.
set -euo pipefail
cd "$(dirname "$0")/../.."
seed=${1:-0}
engine=${2:-embedded}
run=runs/quickstart/seed_$seed
recipe=grpo
sizes=()
if [ "$engine" != embedded ]; then
    run=runs/quickstart/${engine}_seed_$seed
    recipe=grpo_$engine
    sizes=(--num-attention-heads 2 --num-key-value-heads 1) # same number of parameters, with a head size that the engine's CPU kernels support
fi

train() {
    torchrun --standalone --nproc-per-node 2 -m megatron_rl.train "$@" run.seed="$seed"
}

test -e "$run/init/config.json" ||
    python tools/make_toy_model.py --output "$run/init" --seed "$seed" ${sizes[@]+"${sizes[@]}"}
train --config configs/quickstart/sft.yaml model.path="$run/init" run.output_dir="$run/sft"
if [ "${3:-}" = sft ]; then exit; fi
train --config "configs/quickstart/$recipe.yaml" model.path="$run/sft/checkpoints/step_001800/hf" run.output_dir="$run/grpo"
