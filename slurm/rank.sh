#!/usr/bin/env bash
# One rank under srun: its place in the world as torch reads it, then the command.
set -euo pipefail
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
# Some sites' Slurm signals this shell alone, others all processes of the task. So it passes on to the rank that it has to
# stop, as USR1, and the rank ignores both until it has handlers, as whatever it starts by then does; what it starts later
# (reward workers, engines) sees to that itself, or it would die while the rank needs it.
(
    trap '' USR1 TERM
    exec "$@"
) &
rank=$!
trap 'kill -USR1 "$rank" 2>/dev/null || true' USR1 TERM
while kill -0 "$rank" 2>/dev/null; do # a signal ends a wait before its time
    wait "$rank" || true
done
wait "$rank" && status=0 || status=$?
if ((status == START_AGAIN)); then
    touch "$INTERRUPTED" # srun would end the ranks that still write because of a status that is not 0
    exit 0
fi
exit "$status"
