#!/usr/bin/env bash
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/slurm/%x-%j.out
# Convert checkpoints: sbatch slurm/convert.sh hf_to_megatron --input HF_DIR --output DIR --verify   (slurm/README.md)
[[ -n ${SLURM_JOB_ID:-} && ${ENVIRONMENT:-} == BATCH ]] || cd "$(dirname "$0")/.." || exit 1
[[ -f slurm/common.sh ]] || { echo "submit from the root of the repository, not from $PWD" >&2 && exit 2; }
source slurm/common.sh
submit_unless_in_job "slurm/${0##*/}" "$@"
convert "$@"
