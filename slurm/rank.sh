#!/usr/bin/env bash
# One rank under srun: its place in the world as torch reads it, then the command.
set -euo pipefail
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
# Slurm signals all processes of a task. The rank listens; whatever it starts inherits that these are ignored, or it would
# die while the rank still needs it.
trap '' USR1 TERM
"$@" && status=0 || status=$?
if ((status == START_AGAIN)); then
    touch "$INTERRUPTED" # srun would end the ranks that still write because of a status that is not 0
    exit 0
fi
exit "$status"
