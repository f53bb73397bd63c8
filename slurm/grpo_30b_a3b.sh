#!/usr/bin/env bash
#SBATCH --job-name=grpo-30b-a3b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/slurm/%x-%j.out
# GRPO of a 30B mixture of experts with 3B active parameters: sbatch slurm/grpo_30b_a3b.sh [key=value …]   (slurm/README.md)
[[ -n ${SLURM_JOB_ID:-} && ${ENVIRONMENT:-} == BATCH ]] || cd "$(dirname "$0")/.." || exit 1
[[ -f slurm/common.sh ]] || { echo "submit from the root of the repository, not from $PWD" >&2 && exit 2; }
source slurm/common.sh
submit_unless_in_job "slurm/${0##*/}" "$@"
train "${MEGATRON_RL_CONFIG:-configs/recipes/production/grpo-qwen3-30b-a3b-2n8g-h100-bf16.yaml}" "$@"
