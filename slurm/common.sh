# Sourced by the scripts of this folder: submits them, starts the ranks, passes signals on, starts again what failed.
# Nothing here is edited for a site: settings come from slurm/site.sh (see site.example.sh) or the environment.
# shellcheck shell=bash
set -euo pipefail

# shellcheck source=/dev/null
[[ -f slurm/site.sh ]] && source slurm/site.sh

MAX_RESTARTS=${MEGATRON_RL_MAX_RESTARTS:-3} # without a new checkpoint in between
export START_AGAIN=75                       # exit status of a run that was interrupted (megatron_rl/stop.py)

# Outside of a job: submit the script with the same arguments, or with --dry-run say what would be submitted.
submit_unless_in_job() {
    local script=$1 && shift
    [[ -n ${SLURM_JOB_ID:-} ]] && return
    mkdir -p logs/slurm
    if [[ ${1:-} == --dry-run ]]; then
        shift
        echo "sbatch $script $*"
        echo "with, unless options of sbatch or SBATCH_* say otherwise:"
        grep '^#SBATCH' "$script" | sed 's/^#SBATCH /  /'
        env | grep '^SBATCH_' | sort | sed 's/^/  /' || true
        echo "python: $(python_prefix | tr '\n' ' ')"
        exit 0
    fi
    exec sbatch "$script" "$@"
}

# The words before "python …" on a node: nothing in a virtual environment, a container's otherwise.
python_prefix() {
    case ${MEGATRON_RL_RUNTIME:-venv} in
    venv | pyxis) ;; # pyxis is an option of srun
    apptainer)
        printf '%s\n' apptainer exec --nv --bind "${MEGATRON_RL_MOUNTS:-$PWD}" "${MEGATRON_RL_IMAGE:?set it to a .sif file}"
        ;;
    *)
        echo "MEGATRON_RL_RUNTIME=$MEGATRON_RL_RUNTIME: expected venv, apptainer or pyxis" >&2
        return 1
        ;;
    esac
}

srun_options() {
    if [[ ${MEGATRON_RL_RUNTIME:-venv} == pyxis ]]; then
        printf '%s\n' "--container-image=${MEGATRON_RL_IMAGE:?set it to an image}" \
            "--container-mounts=${MEGATRON_RL_MOUNTS:-$PWD:$PWD}" "--container-workdir=$PWD"
    fi
}

# Address and port where the ranks meet. The port follows from job and attempt, so that neither another job of the node
# nor a connection that lingers from the attempt before is in the way.
rendezvous() {
    local head
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_ADDR=$(scontrol show node "$head" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
    MASTER_PORT=$((20000 + (SLURM_JOB_ID * 17 + ${SLURM_RESTART_COUNT:-0} * 7 + $1) % 20000))
    export MASTER_ADDR MASTER_PORT
}

settings() {
    # shellcheck source=/dev/null
    [[ -n ${MEGATRON_RL_VENV:-} ]] && source "$MEGATRON_RL_VENV/bin/activate"
    export PYTHONUNBUFFERED=1
    # ranks share the cores of a node
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    # Megatron overlaps the communication of tensor parallelism with products that were launched before it
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    # a rank that is gone ends the others, and a collective that hung is in a dump
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
    export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
    # as vLLM sets it, with which the trainer shares processes
    export NCCL_CUMEM_ENABLE=${NCCL_CUMEM_ENABLE:-0}
}

# One attempt: a task for every rank, on all nodes; its exit status is the worst of the ranks', or START_AGAIN.
launch() {
    local logs=$1 && shift
    local prefix options status=0
    mapfile -t prefix < <(python_prefix)
    mapfile -t options < <(srun_options)
    export INTERRUPTED=$logs/interrupted
    rm -f "$INTERRUPTED"
    # the output of all ranks in files of their own; the first one's in the job's as well
    srun --kill-on-bad-exit=1 --wait=60 --output="$logs/rank_%t.log" "${options[@]}" \
        slurm/rank.sh "${prefix[@]}" python "$@" &
    local pid=$!
    trap 'kill -USR1 $pid 2>/dev/null || true' USR1 # the time is nearly over
    trap 'kill -TERM $pid 2>/dev/null || true' TERM # somebody asks to stop
    touch "$logs/rank_0.log"
    tail -n 0 -F "$logs/rank_0.log" --pid=$pid 2>/dev/null &
    while kill -0 $pid 2>/dev/null; do # a signal ends a wait before its time
        wait $pid && status=0 || status=$?
    done
    wait $pid 2>/dev/null && status=0 || status=$?
    trap - USR1 TERM
    if ((status == 0)) && [[ -e $INTERRUPTED ]]; then
        return $START_AGAIN
    fi
    return $status
}

# Module and its arguments, once; for what resumes by itself when it is submitted again.
run_once() {
    rendezvous 0
    settings
    local logs=logs/slurm/$SLURM_JOB_NAME-$SLURM_JOB_ID
    mkdir -p "$logs"
    launch "$logs" -m "$@"
}

# train MODULE CONFIG [key=value …]: until it is done. An interrupted run is requeued; one that failed starts again from its
# latest checkpoint, unless it failed there before.
train() {
    local module=$1 config=$2 && shift 2
    settings
    local output=runs/$SLURM_JOB_NAME-$SLURM_JOB_ID
    local logs=logs/slurm/$SLURM_JOB_NAME-$SLURM_JOB_ID
    mkdir -p "$logs"
    local attempt=0 failures=0 before="" status latest
    while true; do
        rendezvous $attempt
        launch "$logs" -m "$module" --config "$config" "run.name=$SLURM_JOB_NAME-$SLURM_JOB_ID" "run.output_dir=$output" \
            "$@" && status=0 || status=$?
        attempt=$((attempt + 1))
        if ((status == 0)); then
            return 0
        fi
        if ((status == START_AGAIN)); then
            scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING || return $status # somebody has cancelled it
            echo "interrupted; job $SLURM_JOB_ID goes back to the queue"
            scontrol requeue "$SLURM_JOB_ID"
            sleep infinity & wait $! # until the scheduler ends this start of the job
        fi
        latest=$(cat "$output/checkpoints/latest" 2>/dev/null || true)
        [[ $latest == "$before" ]] && failures=$((failures + 1)) || failures=1
        before=$latest
        tail -n 20 "$logs"/rank_*.log >&2
        if ((failures > MAX_RESTARTS)); then
            echo "failed $failures times at checkpoint '${latest:-none}' (status $status): giving up. Logs: $logs" >&2
            return $status
        fi
        echo "failed with status $status; starting again from checkpoint '${latest:-none}' ($failures of $MAX_RESTARTS)" >&2
    done
}
