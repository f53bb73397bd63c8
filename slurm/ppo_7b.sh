#!/usr/bin/env bash
#SBATCH --job-name=ppo-7b
#SBATCH --nodes=1
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
# PPO of a 7B or 8B model with a critic of the same size: sbatch slurm/ppo_7b.sh [key=value …]   (slurm/README.md)
[[ -n ${SLURM_JOB_ID:-} && ${ENVIRONMENT:-} == BATCH ]] || cd "$(dirname "$0")/.." || exit 1
[[ -f slurm/common.sh ]] || { echo "submit from the root of the repository, not from $PWD" >&2 && exit 2; }
source slurm/common.sh
submit_unless_in_job "slurm/${0##*/}" "$@"
train "${MEGATRON_RL_CONFIG:-configs/recipes/production/ppo-qwen2.5-7b-1n8g-h100-fp8.yaml}" "$@"
