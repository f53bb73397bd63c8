#!/usr/bin/env bash
# Run one rank under srun: set the environment variables that torch reads, then execute the command.
set -euo pipefail
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
# Depending on the site, Slurm signals only this shell or all processes of the task. Therefore this shell forwards stop
# signals to the rank as USR1. The rank, and every process that it starts before it has installed its handlers, ignores both
# signals. Processes that it starts later (reward workers, engines) have to ignore them on their own: otherwise they would
# exit while the rank needs them.
(
    trap '' USR1 TERM
    exec "$@"
) &
rank=$!
trap 'kill -USR1 "$rank" 2>/dev/null || true' USR1 TERM
while kill -0 "$rank" 2>/dev/null; do # a signal interrupts a wait
    wait "$rank" || true
done
wait "$rank" && status=0 || status=$?
if ((status == EXIT_REQUEUE)); then
    touch "$INTERRUPTED" # the status must be 0: on any other srun ends the ranks that are still writing
    exit 0
fi
exit "$status"
