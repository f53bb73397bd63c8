#!/usr/bin/env bash
# Train process and outcome reward models on a policy's own solutions, and choose the best of eight solutions with them.
# Usage: tools/quickstart/reward_models.sh [SEED]
# torchrun and python of the environment must be on PATH.
set -euo pipefail
cd "$(dirname "$0")/../.."
seed=${1:-0}
run=runs/reward_models/seed_$seed
policy=$run/policy/checkpoints/step_001800/hf
sample=configs/algorithms/chain_sample.yaml

train() {
    torchrun --standalone --nproc-per-node 2 -m "megatron_rl.$1" --config "$2" run.seed="$seed" "${@:3}"
}

choose() {
    torchrun --standalone --nproc-per-node 2 tools/data/best_of_n.py --config "$1" --rollouts "$run/held_out/rollouts" \
        --answer-pattern '=(-?\d+)$' model.path="$2/checkpoints/step_000200/hf"
}

test -e "$run/init/config.json" || python tools/make_toy_model.py --output "$run/init" --seed "$seed"
train train configs/algorithms/chain_sft.yaml model.path="$run/init" run.output_dir="$run/policy"
train train $sample model.path="$policy" run.output_dir="$run/held_out"
train train $sample model.path="$policy" run.output_dir="$run/solutions" \
    data.train.split=train rollout.num_prompts_per_step=64 rollout.group_size=4 run.num_steps=8

echo "Process reward model, steps labelled by eight continuations each:"
python tools/data/label_steps.py --sample $sample --rollouts "$run/solutions/rollouts" --output "$run/labels.jsonl" \
    model.path="$policy" run.seed="$seed"
train train_reward_model configs/algorithms/reward_model_process.yaml model.path="$policy" run.output_dir="$run/process" \
    data.train.kind=jsonl data.train.path="$run/labels.jsonl" data.train.options={} data.chat_template=rendered
choose configs/algorithms/reward_model_process.yaml "$run/process"

echo "Process reward model, exact labels:"
train train_reward_model configs/algorithms/reward_model_process.yaml model.path="$policy" run.output_dir="$run/process_exact"
choose configs/algorithms/reward_model_process.yaml "$run/process_exact"

echo "Outcome reward model, pairs of a correct and a wrong solution:"
train train_reward_model configs/algorithms/reward_model_outcome.yaml model.path="$policy" run.output_dir="$run/outcome"
choose configs/algorithms/reward_model_outcome.yaml "$run/outcome"
