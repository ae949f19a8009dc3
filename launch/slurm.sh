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
#
# Preemption: some minutes before the end (--signal) or when Slurm takes the machines back, every rank is asked to save
# (SIGUSR2); they exit 85 after the step in hand, the job goes back to the queue under its number and resumes from there. Give a
# warning longer than a step and a save (sbatch --signal=B:USR1@3600); what a shorter one cuts off is done again from the checkpoint.
# After scancel (SIGTERM without that warning, and no PreemptTime in `scontrol show job`) the job stays down.
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
    case "${R1MEGA_CONTAINER:-}" in
    '') ;;
    *.sif) set -- "$@" apptainer exec --nv --bind "$PWD${R1MEGA_MOUNTS:+,$R1MEGA_MOUNTS}" --pwd "$PWD" "$R1MEGA_CONTAINER" ;;
    *) set -- "$@" --container-image="$R1MEGA_CONTAINER" --container-workdir="$PWD" \
        --container-mounts="$PWD:$PWD${R1MEGA_MOUNTS:+,$R1MEGA_MOUNTS}" ;;
    esac
    echo "$@"
}

log_dir() { echo "${R1MEGA_LOGS:-$PWD/logs}/$SLURM_JOB_NAME-$SLURM_JOB_ID"; }

# The environment of every rank.
prepare_job() {
    mkdir -p "$(log_dir)"
    local first=${SLURM_JOB_NODELIST:-}
    first=$(scontrol show hostnames "$first" | head -n 1)
    # the address that Slurm itself reaches the machine by; inside a container there is no scontrol to ask
    export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show node -o "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)}
    export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
    if [ -n "${R1MEGA_INTERFACE:-}" ]; then
        export GLOO_SOCKET_IFNAME=$R1MEGA_INTERFACE NCCL_SOCKET_IFNAME=$R1MEGA_INTERFACE
    fi
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1} # a dead peer ends the ranks that wait for it
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # Megatron: communication is queued before the GEMM it overlaps
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
    if [ -n "${R1MEGA_CONTAINER:-}" ]; then # its interpreter knows nothing of this directory
        export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
    fi
}

# run_in_job COMMAND...: a command that calls srun, with this job's signals, requeue and exit code.
run_in_job() {
    prepare_job
    local errors child code interrupted warned=0 cancelled=0
    errors=$(log_dir)/srun-${SLURM_RESTART_COUNT:-0}.log
    echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1)); a log for each rank: $(log_dir)/rank-N.log"
    trap 'interrupted=1 warned=1; scancel --signal=USR2 "$SLURM_JOB_ID"' USR1 # all steps, not this shell
    trap 'interrupted=1 cancelled=1; scancel --signal=USR2 "$SLURM_JOB_ID"; preempted && warned=1' TERM
    "$@" 2> >(tee -a "$errors" >&2) &
    child=$!
    while :; do
        interrupted=0
        wait "$child"
        code=$?
        [ "$interrupted" = 1 ] || break
    done
    trap - USR1 TERM
    [ "$code" = 0 ] && return
    name_failure "$errors" "$code"
    if [ "$code" = "$SAVED" ]; then requeue $((cancelled && !warned)); fi
    exit "$code"
}

# Slurm takes the machines of a running job back: SIGTERM without the warning, where its grace time is shorter than --signal's.
preempted() { [[ "$(scontrol show job -o "$SLURM_JOB_ID")" =~ \ PreemptTime=[0-9] ]]; }

# name_failure FILE CODE: say by srun's own words which rank ended first, and make its exit code the job's: what the others end
# with follows from that one. (One that failed may make the others exit 85; the first that saved has the others terminated.)
name_failure() {
    local line rank own
    line=$(grep -E 'srun: error: .* tasks? [0-9,-]+: ' "$1" | head -n 1)
    [ -n "$line" ] || return 0
    own=$(grep -oE 'Exited with exit code [0-9]+' <<<"$line" | grep -oE '[0-9]+$')
    code=${own:-$2}
    [ "$code" = "$SAVED" ] && [ -n "$own" ] && return
    [ "$code" = "$SAVED" ] && code=1
    rank=$(grep -oE 'tasks? [0-9,-]+:' <<<"$line" | grep -oE '[0-9,-]+')
    echo "launch: rank $rank failed first (${line##*: }); see $(log_dir)/rank-$rank.log" >&2
}

# requeue CANCELLED: back to the queue, but where SIGTERM came without the warning before it and without a preemption. So ends
# scancel. Slurm's state of the job (COMPLETING) does not tell the two apart, its PreemptTime does.
requeue() {
    if [ "$1" = 1 ]; then
        echo "launch: state saved; the job was cancelled, so it stays down" >&2
    elif [ "${SLURM_RESTART_COUNT:-0}" -ge "${R1MEGA_MAX_REQUEUES:-1000}" ]; then
        echo "launch: state saved; requeued $SLURM_RESTART_COUNT times already, submit again to go on" >&2
    else
        echo "launch: state saved, back to the queue" >&2
        trap '' TERM
        scontrol requeue "$SLURM_JOB_ID"
    fi
}
