# Runs stages of the recipe; sourced by the stage scripts, which submit as they are:
#
#   sbatch launch/stage2.sh [CONFIG] [key.sub=value ...]      on a Slurm cluster, from the repository's root
#   bash   launch/stage2.sh [CONFIG] [key.sub=value ...]      on this machine, a rank a GPU (R1MEGA_RANKS: so many)
#
# The header of a stage script asks for one machine of 8 GPUs. sbatch's own options and variables change that:
# sbatch --nodes=32 ..., SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS, SBATCH_TIMELIMIT, SBATCH_CONSTRAINT.
# Read here:
#   R1MEGA_HOME        the repository (default: where sbatch was called)
#   R1MEGA_PYTHON      the interpreter (default: .venv/bin/python, else python)
#   R1MEGA_LOGS        log files go to $R1MEGA_LOGS/NAME-JOBID/rank-N.log (default: logs)
#   R1MEGA_CONTAINER   an image: *.sif by apptainer, anything else by enroot (srun --container-image, the pyxis plugin)
#   R1MEGA_CONTAINER_PYTHON  the interpreter inside of it, with the packages of this repository (default: python)
#   R1MEGA_MOUNTS      more host:container mounts for it, separated by commas
#   R1MEGA_INTERFACE   network interface of gloo and of NCCL's first contact (default: theirs)
#   R1MEGA_SRUN        more options for srun
#   R1MEGA_MAX_REQUEUES  how often a job goes back to the queue by itself (default 1000)
#   R1MEGA_SPARE_NODES so many of the job's machines stand by for those on which a rank dies (default 0); sbatch --no-kill then keeps
#                      the job where a machine other than its first goes
#   R1MEGA_LAST_SECONDS  so long before the time limit a job that was warned and has not saved goes back to the queue (default 60)
#
# Preemption: some minutes before the end (--signal) or when Slurm takes the machines back, every rank is asked to save
# (SIGUSR2); they exit 85 after the step in hand, the job goes back to the queue under its number and resumes from there. Give a
# warning longer than a step and a save (sbatch --signal=B:USR1@3600; the log of a run that stopped says how much it wants). Where it is
# shorter the job goes back to the queue shortly before its limit all the same, once a start has kept something, and does that step again.
# After scancel (SIGTERM without that warning, and no PreemptTime in `scontrol show job`) the job stays down.
# A rank that dies has all of them started again within the job, without its machine where one is spare, if a checkpoint is newer than
# what the last start went on from (docs/faults.md; $R1MEGA_PYTHON decides, so it must be able to import r1mega, in a container's job too).
# Any other end is the job's end, with the exit code of the rank that failed first, which the log names.
set -uo pipefail
cd "${R1MEGA_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}}" || exit 2
[ -f launch/slurm.sh ] || { echo "launch: $PWD is not the repository; sbatch from its root, or set R1MEGA_HOME" >&2; exit 2; }
SAVED=85
if [ -z "${R1MEGA_PYTHON:-}" ]; then
    R1MEGA_PYTHON=python
    [ -x .venv/bin/python ] && R1MEGA_PYTHON=$PWD/.venv/bin/python
fi
RANK_PYTHON=$R1MEGA_PYTHON
[ -n "${R1MEGA_CONTAINER:-}" ] && RANK_PYTHON=${R1MEGA_CONTAINER_PYTHON:-python}

# run_stages DEFAULT... -- [CONFIG] [key.sub=value ...]: CONFIG, or without one the defaults, one after the other.
run_stages() {
    local config defaults=()
    while [ "$1" != -- ]; do defaults+=("$1") && shift; done
    shift
    if [ $# -gt 0 ] && { [ -f "$1" ] || [[ $1 != *=* ]]; }; then
        run_stage "$@"
    else
        for config in "${defaults[@]}"; do run_stage "$config" "$@"; done
    fi
}

# run_stage CONFIG [key.sub=value ...]: one stage to its end, in this job or on this machine. Does not return on failure.
run_stage() {
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        run_in_job $(rank_launcher) "$RANK_PYTHON" -m r1mega train "$@"
    else
        local ranks=${R1MEGA_RANKS:-$(gpus_here)}
        [ "$ranks" -gt 1 ] && set -- --ranks "$ranks" "$@"
        "$R1MEGA_PYTHON" -m r1mega train "$@" || exit
    fi
}

gpus_here() {
    local count
    count=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || true
    echo "$((count > 0 ? count : 1))"
}

# What stands before a rank's command in a job: srun, one task a GPU, and the container.
rank_launcher() {
    local tasks=${SLURM_NTASKS_PER_NODE:-1} cpus=${SLURM_CPUS_ON_NODE:-1}
    set -- srun --kill-on-bad-exit=1 --open-mode=append --output="$(log_dir)/rank-%t.log" \
        --cpus-per-task=$((cpus / tasks > 0 ? cpus / tasks : 1)) ${R1MEGA_SRUN:-}
    # which machines: filled in by run_in_job for each start
    [ "${R1MEGA_SPARE_NODES:-0}" = 0 ] || set -- "$@" --nodes=@COUNT@ --ntasks=@TASKS@ --nodelist=@NODES@
    case "${R1MEGA_CONTAINER:-}" in
    '') ;;
    *.sif) set -- "$@" apptainer exec --nv --bind "$PWD${R1MEGA_MOUNTS:+,$R1MEGA_MOUNTS}" --pwd "$PWD" "$R1MEGA_CONTAINER" ;;
    *) set -- "$@" --container-image="$R1MEGA_CONTAINER" --container-workdir="$PWD" \
        --container-mounts="$PWD:$PWD${R1MEGA_MOUNTS:+,$R1MEGA_MOUNTS}" --no-container-mount-home --container-env="$CONTAINER_ENV" ;;
    esac
    echo "$@"
}

# Of these an image's own values would count before the job's; and a home of the host has packages of its own.
CONTAINER_ENV=PYTHONPATH,PYTHONUNBUFFERED,PYTHONFAULTHANDLER,OMP_NUM_THREADS,MASTER_ADDR,MASTER_PORT,NCCL_DEBUG,NCCL_SOCKET_IFNAME
CONTAINER_ENV+=,GLOO_SOCKET_IFNAME,TORCH_NCCL_ASYNC_ERROR_HANDLING,CUDA_DEVICE_MAX_CONNECTIONS,R1MEGA_SAY_RUN_DIR

log_dir() { echo "${R1MEGA_LOGS:-$PWD/logs}/$SLURM_JOB_NAME-$SLURM_JOB_ID"; }

# The environment of every rank.
prepare_job() {
    mkdir -p "$(log_dir)"
    export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
    if [ -n "${R1MEGA_INTERFACE:-}" ]; then
        export GLOO_SOCKET_IFNAME=$R1MEGA_INTERFACE NCCL_SOCKET_IFNAME=$R1MEGA_INTERFACE
    fi
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1} # a dead peer ends the ranks that wait for it
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # Megatron: communication is queued before the GEMM it overlaps
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 # a rank that crashes says where
    export R1MEGA_SAY_RUN_DIR=$(log_dir)/run_dir # rank 0 writes there where its run directory is: whether to start again is read in it
    if [ -n "${R1MEGA_CONTAINER:-}" ]; then # its interpreter knows nothing of this directory
        export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
    fi
}

# run_in_job COMMAND...: a command that calls srun, with this job's signals, its starts by itself, requeue and exit code.
run_in_job() {
    local code warned=0 cancelled=0 attempt=0 failed_nodes=() seconds errors timer=
    prepare_job
    trap 'interrupted=1 warned=1; scancel --signal=USR2 "$SLURM_JOB_ID"; set_timer' USR1 # all steps, not this shell
    trap 'interrupted=1 cancelled=1; scancel --signal=USR2 "$SLURM_JOB_ID"; preempted && warned=1' TERM
    trap 'interrupted=1; requeue_unsaved && exit "$SAVED"' ALRM
    while :; do
        errors=$(log_dir)/srun-${SLURM_RESTART_COUNT:-0}.$attempt.log
        start_once "$@"
        [ "$code" = 0 ] && { stop_timer; trap - USR1 TERM ALRM; return; }
        name_failure "$errors" "$code"
        [ "$((warned + cancelled))" = 0 ] && seconds=$(seconds_until_restart "$code") || break
        attempt=$((attempt + 1))
        echo "launch: exit code $code, and a newer checkpoint: starting again in $seconds s${failed_nodes[*]:+, without ${failed_nodes[*]}}" >&2
        wait_for sleep "$seconds"
        [ "$((warned + cancelled))" = 0 ] || { code=$SAVED && break; }
    done
    stop_timer
    trap - USR1 TERM ALRM
    if [ "$code" = "$SAVED" ]; then requeue $((cancelled && !warned)); fi
    exit "$code"
}

# start_once COMMAND...: one start of all ranks, on machines of the job on which none has died yet; code is how it ended.
start_once() {
    local nodes first tasks=${SLURM_NTASKS_PER_NODE:-1} count
    nodes=$(job_nodes) count=$(job_nodes | wc -l) first=${nodes%%$'\n'*} nodes=${nodes//$'\n'/,}
    # the address that Slurm itself reaches the machine by; inside a container there is no scontrol to ask
    export MASTER_ADDR=${GIVEN_MASTER:-$(scontrol show node -o "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)}
    set -- "${@//@COUNT@/$count}"
    set -- "${@//@TASKS@/$((count * tasks))}"
    set -- "${@//@NODES@/$nodes}"
    echo "job $SLURM_JOB_ID on $nodes, start $((${SLURM_RESTART_COUNT:-0} + attempt + 1)); a log for each rank: $(log_dir)/rank-N.log"
    wait_for "$@" 2> >(tee -a "$errors" >&2)
}
GIVEN_MASTER=${MASTER_ADDR:-}

# job_nodes: where the ranks go, a name a line: all machines of the job without the spare ones. The failed ones come last.
job_nodes() {
    local all
    all=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    { grep -vxF "$(printf '%s\n' "${failed_nodes[@]-}")" <<<"$all"; grep -xF "$(printf '%s\n' "${failed_nodes[@]-}")" <<<"$all"; } |
        head -n $(($(wc -l <<<"$all") - ${R1MEGA_SPARE_NODES:-0}))
}

# wait_for COMMAND...: run it while this shell takes signals; code is how it ended.
wait_for() {
    local child interrupted
    "$@" &
    child=$!
    while :; do
        interrupted=0
        wait "$child"
        code=$?
        [ "$interrupted" = 1 ] || break
        [ "$1" = sleep ] && { kill "$child"; break; } # asked to stop between two starts
    done
}

# seconds_until_restart CODE: how long until the ranks are started again; fails where they are not to be. Without CODE: whether this
# start has kept something.
seconds_until_restart() {
    local run_dir
    run_dir=$(cat "$R1MEGA_SAY_RUN_DIR" 2>/dev/null) && "$R1MEGA_PYTHON" -m r1mega.observe.restarts "$run_dir" "$@"
}

# set_timer: SIGALRM to this shell shortly before the time limit.
set_timer() {
    local end
    end=$(date -d "$(scontrol show job -o "$SLURM_JOB_ID" | grep -oE ' EndTime=[^ ]+' | cut -d= -f2)" +%s 2>/dev/null) || return 0 # unlimited
    stop_timer
    (exec 2>/dev/null; sleep $(((end -= $(date +%s) + ${R1MEGA_LAST_SECONDS:-60}) > 0 ? end : 0)); kill -ALRM $$) &
    timer=$!
}

stop_timer() { [ -z "$timer" ] || kill "$timer" 2>/dev/null; timer=; }

# requeue_unsaved: the limit is near and the step in hand has not ended. Not where this start kept nothing: so would the next one.
requeue_unsaved() {
    if ! seconds_until_restart; then
        echo "launch: the time limit comes before the first checkpoint of this start: another would end so too; give it more time" >&2
        return 1
    fi
    requeue 0 "the step in hand is longer than the warning"
}

# Slurm takes the machines of a running job back: SIGTERM without the warning, where its grace time is shorter than --signal's.
preempted() { [[ "$(scontrol show job -o "$SLURM_JOB_ID")" =~ \ PreemptTime=[0-9] ]]; }

# name_failure FILE CODE: say by srun's own words which rank ended first, and make its exit code the job's: what the others end
# with follows from that one. (One that failed may make the others exit 85; the first that saved has the others terminated.)
name_failure() {
    local line rank own
    failed_nodes+=($(sed -nE 's/.*srun: error: Node failure on ([^ .]+).*/\1/p' "$1"))
    line=$(grep -E 'srun: error: .* tasks? [0-9,-]+: ' "$1" | head -n 1)
    [ -n "$line" ] || return 0
    own=$(grep -oE 'Exited with exit code [0-9]+' <<<"$line" | grep -oE '[0-9]+$')
    code=${own:-$2}
    [ "$code" = "$SAVED" ] && [ -n "$own" ] && return
    [ "$code" = "$SAVED" ] && code=1
    rank=$(grep -oE 'tasks? [0-9,-]+:' <<<"$line" | grep -oE '[0-9,-]+')
    failed_nodes+=($(scontrol show hostnames "$(sed -E 's/.*srun: error: ([^ ]+): tasks? .*/\1/' <<<"$line")"))
    echo "launch: rank $rank failed first (${line##*: }); see $(log_dir)/rank-${rank%%[,-]*}.log" >&2
}

# requeue CANCELLED [WHY]: back to the queue, but where SIGTERM came without the warning before it and without a preemption. So ends
# scancel. Slurm's state of the job (COMPLETING) does not tell the two apart, its PreemptTime does.
requeue() {
    if [ "$1" = 1 ]; then
        echo "launch: state saved; the job was cancelled, so it stays down" >&2
    elif [ "${SLURM_RESTART_COUNT:-0}" -ge "${R1MEGA_MAX_REQUEUES:-1000}" ]; then
        echo "launch: state saved; requeued $SLURM_RESTART_COUNT times already, submit again to go on" >&2
    else
        echo "launch: ${2:-state saved}, back to the queue" >&2
        trap '' TERM
        scontrol requeue "$SLURM_JOB_ID"
        return 0 # without a number, within a trap, it would be what went before the signal
    fi
    return 1
}
