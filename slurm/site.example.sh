# Copy to slurm/site.sh (git ignores it) and fill in what your site needs; the scripts themselves stay as they are.
# shellcheck shell=bash disable=SC2034

# Options of sbatch, in the environment: they hold for "slurm/grpo_7b.sh …". For "sbatch slurm/grpo_7b.sh …" export them in
# your shell, for instance by sourcing this file from ~/.bashrc.
# export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=my-project SBATCH_QOS=normal

# Python: a virtual environment on a file system that all nodes see …
# export MEGATRON_RL_VENV=$HOME/megatron_rl/.venv
# … or a container: apptainer (.sif) or pyxis (an image that enroot reads)
# export MEGATRON_RL_RUNTIME=apptainer MEGATRON_RL_IMAGE=/images/megatron_rl.sif MEGATRON_RL_MOUNTS=/scratch,$PWD

# Data sets, on a file system that all nodes see; the second where nodes have no internet
# export HF_HOME=/scratch/$USER/hf
# export HF_HUB_OFFLINE=1

# The network between nodes, if the first interface is not the one
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5

# Starts without a new checkpoint in between before a failing job gives up
# export MEGATRON_RL_MAX_RESTARTS=3
