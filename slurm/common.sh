# Sourced by the scripts of this folder: submits them, starts the ranks, passes signals on, starts again what failed.
# Nothing here is edited for a site: settings come from slurm/site.sh (see site.example.sh) or the environment.
# shellcheck shell=bash
set -euo pipefail

# Files of a site, modules and activations fail in ways that mean nothing, so they are read without -e and -u.
read_settings() {
    set +eu
    # shellcheck source=/dev/null
    source "$1"
    set -eu
}

if [[ -f slurm/site.sh ]]; then
    read_settings slurm/site.sh
fi

MAX_RESTARTS=${MEGATRON_RL_MAX_RESTARTS:-3} # without a new checkpoint in between
GRACE_S=${MEGATRON_RL_GRACE_S:-540}         # from being told that time is up to going back to the queue unsaved
PATIENCE_TRIES=60 PATIENCE_S=5              # with a controller of Slurm that does not answer
export START_AGAIN=75                       # exit status of a run that was interrupted (megatron_rl/distributed/signals.py)

# Outside of a batch job: submit the script with the same arguments, or with --dry-run say what would be submitted.
submit_unless_in_job() {
    local script=$1 argument is_dry="" arguments=() && shift
    [[ ${ENVIRONMENT:-} == BATCH && -n ${SLURM_JOB_ID:-} ]] && return
    for argument in "$@"; do
        [[ $argument == --dry-run ]] && is_dry=yes || arguments+=("$argument")
    done
    [[ -n $is_dry ]] || exec sbatch "$script" "$@"
    echo sbatch "$script" "${arguments[@]@Q}"
    echo "with, unless options of sbatch or SBATCH_* say otherwise:"
    grep '^#SBATCH' "$script" | sed 's/^#SBATCH /  /'
    env | grep '^SBATCH_' | sort | sed 's/^/  /' || true
    echo "a rank: $(python_prefix | tr '\n' ' ')python"
    exit 0
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
    # said again, as srun does not take them over from sbatch
    printf '%s\n' "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}" --export=ALL
    if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
        printf '%s\n' --gpu-bind=none # a rank chooses its GPU by its place on the node
    fi
    if [[ ${MEGATRON_RL_RUNTIME:-venv} == pyxis ]]; then
        printf '%s\n' "--container-image=${MEGATRON_RL_IMAGE:?set it to an image}" \
            "--container-mounts=${MEGATRON_RL_MOUNTS:-$PWD:$PWD}" "--container-workdir=$PWD"
    fi
}

# Address and port where the ranks meet. The port follows from job and attempt, so that neither another job of the node
# nor a connection that lingers from the attempt before is in the way; it is below those that Linux gives out by itself.
rendezvous() {
    local head
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_ADDR=$(scontrol show node "$head" 2>/dev/null | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2 || true)
    MASTER_ADDR=${MASTER_ADDR:-$head}
    MASTER_PORT=$((20000 + (SLURM_JOB_ID * 17 + ${SLURM_RESTART_COUNT:-0} * 7 + $1) % 12000))
    export MASTER_ADDR MASTER_PORT
}

end_of_job() { # seconds since 1970; nothing where Slurm does not say
    local end
    end=$(squeue --noheader --format=%e --jobs="$SLURM_JOB_ID" 2>/dev/null) || true
    [[ -z $end ]] || date -d "$end" +%s 2>/dev/null || true # of nothing, date would make today
}

settings() {
    if [[ -n ${MEGATRON_RL_VENV:-} ]]; then
        read_settings "$MEGATRON_RL_VENV/bin/activate"
    fi
    export PYTHONUNBUFFERED=1
    # when a run has to stop by itself; Slurm before 22.05 does not say so
    SLURM_JOB_END_TIME=${SLURM_JOB_END_TIME:-$(end_of_job)}
    export SLURM_JOB_END_TIME
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

# The job, or the one task of an array that this is.
job_id() {
    echo "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}" | grep . || echo "$SLURM_JOB_ID"
}

# What Slurm says of the job. Its controller is busiest when many jobs end at once, so that it is asked for minutes.
state() {
    local try said
    for ((try = 0; try < PATIENCE_TRIES; try++)); do
        said=$(squeue --noheader --format=%T --jobs="$(job_id)") && [[ -n $said ]] && echo "$said" && return
        sleep "$PATIENCE_S"
    done
    echo unknown
}

is_running() { # somebody may have cancelled it
    [[ $(state) =~ ^(RUNNING|unknown)$ ]]
}

# Back to the queue, unless it was interrupted again and again where it is now: a time limit that is too short for a step would
# come back for ever.
go_back() {
    local here=$1 times try
    echo "$here" >>"$requeued" || true # a full disk is no reason to stay
    times=$(tail -n $((MAX_RESTARTS + 1)) "$requeued" 2>/dev/null | grep -cFx -- "$here") || true
    if ((${times:-0} > MAX_RESTARTS)); then
        echo "interrupted again and again at '$here': giving up. The time limit is too short." >&2
        return 1
    fi
    echo "interrupted; job $(job_id) goes back to the queue"
    for ((try = 0; try < PATIENCE_TRIES; try++)); do
        scontrol requeue "$(job_id)" && return
        sleep "$PATIENCE_S"
        PATIENCE_TRIES=1 is_running || return 1
    done
    return 1
}

asked=0 # to stop
attempt=0 # of this start of the job
fallback="" # process that goes back to the queue when nothing else does
srun_pid=""

# A scheduler says that time is up (USR1), or somebody asks to stop (TERM, which srun would turn into a kill).
on_request() {
    if ((asked == 0)); then
        (sleep "$GRACE_S" && is_running && go_back "$(progress)") & # whatever hangs
        fallback=$!
    fi
    asked=1
}

# The ranks' output of the attempts before, of the last five.
set_logs_aside() {
    local logs=$1 number
    compgen -G "$logs/rank_*.log" >/dev/null || return 0
    rm -rf "$logs/5_attempts_ago"
    for number in 4 3 2 1; do
        [[ ! -d $logs/${number}_attempts_ago ]] || mv "$logs/${number}_attempts_ago" "$logs/$((number + 1))_attempts_ago"
    done
    mkdir "$logs/1_attempts_ago"
    mv "$logs"/rank_*.log "$logs/1_attempts_ago"
}

# One attempt: a task for every rank, on all nodes; its exit status is the worst of the ranks', or START_AGAIN.
launch() {
    local text prefix=() options status=0 told=-15
    text=$(python_prefix) || exit 2
    [[ -z $text ]] || mapfile -t prefix <<<"$text"
    text=$(srun_options) || exit 2
    mapfile -t options <<<"$text"
    export INTERRUPTED=$logs/interrupted
    rm -f "$INTERRUPTED"
    set_logs_aside "$logs"
    # the output of all ranks in files of their own; the first one's in the job's as well
    touch "$logs/rank_0.log"
    srun --kill-on-bad-exit=1 --wait=0 --output="$logs/rank_%t.log" "${options[@]}" \
        slurm/rank.sh "${prefix[@]}" python "$@" &
    srun_pid=$!
    tail -n 0 -F "$logs/rank_0.log" --pid="$srun_pid" 2>/dev/null &
    while kill -0 "$srun_pid" 2>/dev/null; do
        if ((asked && SECONDS - told >= 15)); then # again and again: a rank that only begins does not hear yet
            told=$SECONDS
            kill -USR1 "$srun_pid" 2>/dev/null || true
        fi
        sleep 1 &
        wait $! || true # a signal ends it before its time
    done
    wait "$srun_pid" && status=0 || status=$?
    srun_pid=""
    if [[ -e $INTERRUPTED ]]; then
        return "$START_AGAIN"
    fi
    return "$status"
}

# The machine's faults, found before the run finds them; MEGATRON_RL_DOCTOR=skip leaves it out.
examine() {
    local logs=$logs/doctor further
    [[ ${MEGATRON_RL_DOCTOR:-} != skip ]] || return 0
    rendezvous 99
    mkdir -p "$logs"
    read_more_arguments
    launch tools/doctor.py "$@" "${further[@]}" && return 0
    ((asked)) && return 0 # time was up; what follows goes back to the queue
    tail -n 5 "$logs"/rank_*.log >&2
    echo "the doctor found faults: see above, and $logs. MEGATRON_RL_DOCTOR=skip starts nevertheless." >&2
    return 1
}

bytes_in() {
    du -sb "$1" 2>/dev/null | cut -f1 | grep . || echo "the beginning"
}

progress() { echo "the beginning"; } # how far it is; what a command does not say otherwise

more_arguments() { :; } # that an attempt gets, one a line; none

# Into the array further.
read_more_arguments() {
    local text
    text=$(more_arguments)
    further=()
    [[ -z $text ]] || mapfile -t further <<<"$text"
}

# until_done COMMAND …: attempts until it is done. An interrupted one is requeued; one that failed starts again, unless it came
# no further than before.
until_done() {
    local failures=0 before=none status here further
    while true; do
        rendezvous $attempt
        read_more_arguments
        launch "$@" "${further[@]}" && status=0 || status=$?
        attempt=$((attempt + 1))
        if ((status == 0)); then
            return 0
        fi
        is_running || return "$status"
        here=$(progress)
        if ((status == START_AGAIN || asked)); then
            trap 'exit 0' TERM # by which the scheduler ends this start of the job
            go_back "$here" || return "$status"
            sleep 300 &
            wait $!
            exit 0
        fi
        [[ $here == "$before" ]] && failures=$((failures + 1)) || failures=1
        before=$here
        tail -n 20 "$logs"/rank_*.log >&2
        if ((failures > MAX_RESTARTS)); then
            echo "failed $failures times at '$here' (status $status): giving up. Logs: $logs" >&2
            return "$status"
        fi
        echo "failed with status $status; starting again from '$here' ($failures of $MAX_RESTARTS)" >&2
    done
}

begin() {
    trap on_request USR1 TERM
    trap '[[ -z $fallback ]] || kill "$fallback" 2>/dev/null || true' EXIT
    settings
    name=$SLURM_JOB_NAME-$SLURM_JOB_ID
    logs=logs/slurm/$name
    mkdir -p "$logs"
    requeued=$logs/requeued_at
}

# given KEY DEFAULT key=value …: what the arguments say of a key.
given() {
    local key=$1 value=$2 argument && shift 2
    for argument in "$@"; do
        [[ $argument == "$key="* ]] && value=${argument#*=}
    done
    echo "$value"
}

# train CONFIG [key=value …]
train() {
    local config=$1 name logs requeued output && shift
    begin
    output=$(given run.output_dir "runs/$name" "$@")
    local began=$logs/began
    [[ -e $began ]] || touch "$began" || true
    local own=(--config "$config" "run.name=$name" "run.output_dir=$output" "$@")
    progress() { cat "$output/checkpoints/latest" 2>/dev/null || echo "the beginning"; }
    # the arguments may say how it begins (--resume PATH, --resume never); once this job has begun, it goes on from its own
    more_arguments() {
        ((${SLURM_RESTART_COUNT:-0} + attempt > 0)) || return 0
        [[ ! $output/checkpoints/latest -nt $began && "${own[*]} " != *" --resume"[\ =]"never "* ]] || printf '%s\n' --resume auto
    }
    examine "${own[@]}"
    until_done -m megatron_rl.train "${own[@]}"
}

# evaluate CONFIG [key=value …]: an evaluation goes on with the answers that its folder has.
evaluate() {
    local config=$1 name logs requeued output && shift
    begin
    output=$(given run.output_dir "runs/eval/$name" "$@")
    progress() { bytes_in "$output"; }
    until_done -m megatron_rl.evaluate --config "$config" "run.name=$name" "run.output_dir=$output" "$@"
}

# convert DIRECTION …: tools/convert_DIRECTION.py, which goes on where it was.
convert() {
    local direction=$1 name logs requeued && shift
    begin
    local argument before="" output=""
    for argument in "$@"; do
        [[ $before != --output ]] || output=$argument
        before=$argument
    done
    progress() { bytes_in "$output.partial"; } # which becomes OUTPUT in the end
    case $direction in
    hf_to_megatron | megatron_to_hf) until_done "tools/convert_$direction.py" "$@" ;;
    *)
        echo "convert.sh $direction: expected hf_to_megatron or megatron_to_hf" >&2
        return 2
        ;;
    esac
}
