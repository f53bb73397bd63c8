# Copy this file to slurm/site.sh, which git ignores, and set what your site needs. The scripts need no changes.
# shellcheck shell=bash disable=SC2034

# Options of sbatch as environment variables. They apply to "slurm/grpo_7b.sh …". For "sbatch slurm/grpo_7b.sh …" export
# them in your shell, for instance by sourcing this file from ~/.bashrc.
# export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=my-project SBATCH_QOS=normal

# Python: either a virtual environment on a file system that all nodes see,
# export MEGATRON_RL_VENV=$HOME/megatron_rl/.venv
# or a container: apptainer (.sif) or pyxis (an image that enroot reads)
# export MEGATRON_RL_RUNTIME=apptainer MEGATRON_RL_IMAGE=/images/megatron_rl.sif MEGATRON_RL_MOUNTS=/scratch,$PWD

# Cache of data sets, on a file system that all nodes see; HF_HUB_OFFLINE if the nodes have no internet access
# export HF_HOME=/scratch/$USER/hf
# export HF_HUB_OFFLINE=1

# Network interface between nodes, if it is not the first one
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5

# Restarts without a new checkpoint before a failing job gives up
# export MEGATRON_RL_MAX_RESTARTS=3
