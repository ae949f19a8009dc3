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
#   R1MEGA_MOUNTS      more host:container mounts for it, separated by commas; the run directory's has to have one path on both sides,
#                      else a job does not start its ranks again
#   R1MEGA_INTERFACE   network interface of gloo and of NCCL's first contact (default: theirs)
#   R1MEGA_SRUN        more options for srun
#   R1MEGA_MAX_REQUEUES  how often a job goes back to the queue by itself (default 1000)
#   R1MEGA_SPARE_NODES so many of the job's machines stand by for those on which a rank dies (default 0); sbatch --no-kill then keeps
#                      the job where a machine other than its first goes (launch/pipeline.sh asks for both by itself)
#   R1MEGA_LAST_SECONDS  so long before the time limit a job that was warned and has not saved goes back to the queue (default 60; at most
#                      half of what was left at the warning)
#
# Preemption: some minutes before the end (--signal) or when Slurm takes the machines back, every rank is asked to save
# (SIGUSR2); they exit 85 after the step in hand, the job goes back to the queue under its number and resumes from there. Give a
# warning longer than a step and a save (sbatch --signal=B:USR1@3600; the log of a run that stopped says how much it wants). Where the
# run's steps and saves turn out to be longer than that, this script asks them earlier (RUN_DIR/pace.json). Where it is still
# shorter the job goes back to the queue shortly before its limit all the same, if it has kept something since Slurm started it, and does that step again.
# After scancel (SIGTERM without that warning or long before the limit, and no PreemptTime in `scontrol show job`) the job stays down.
# A rank that dies has all of them started again within the job, if a checkpoint is newer than what the last start went on from
# (docs/faults.md; $R1MEGA_PYTHON decides, so it must be able to import r1mega, in a container's job too): without its machine while one
# is spare. A machine that was left out is not used again; where Slurm has lost more of them than were spare, the job goes back to the queue.
# Any other end is the job's end, with the exit code of the rank that failed first, which the log names.
set -uo pipefail
cd "${R1MEGA_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}}" || exit 2
[ -f launch/slurm.sh ] || { echo "launch: $PWD is not the repository; sbatch from its root, or set R1MEGA_HOME" >&2; exit 2; }
SAVED=85 LOST=137 UNHEARD=140 # of SIGKILL; of SIGUSR2 before a rank listens to it
SECONDS_FOR_MACHINES=300 # a second start waits so long for the machines that the first has left
SECONDS_BETWEEN_REMINDERS=10 # the first; each is twice as long after the one before, up to SECONDS_BETWEEN_LOOKS
SECONDS_BETWEEN_LOOKS=60 # whether the job's first machine is still there, and whether the run wants to be warned
SECONDS_OF_CLOCKS=60 # SIGTERM of the time limit comes no earlier than so long before it, by this machine's clock
warned=0 cancelled=0 limit= timer= early= guard= guards= left_out=() # of the whole job
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
        --cpus-per-task=$((cpus / tasks > 0 ? cpus / tasks : 1)) --cpu-bind=none ${R1MEGA_SRUN:-} # a rank stays near its GPU by itself
    # which machines: filled in by start_once
    [ "${R1MEGA_SPARE_NODES:-0}" = 0 ] || set -- "$@" --nodes=@COUNT@ --ntasks=@TASKS@ --nodelist=@NODES@
    local mounts=${R1MEGA_MOUNTS:+,$R1MEGA_MOUNTS} logs
    logs=$(log_dir)
    [[ $logs == "$PWD"/* ]] || mounts+=,$logs:$logs
    case "${R1MEGA_CONTAINER:-}" in
    '') ;;
    *.sif) set -- "$@" apptainer exec --nv --bind "$PWD$mounts" --pwd "$PWD" "$R1MEGA_CONTAINER" ;;
    *) set -- "$@" --container-image="$R1MEGA_CONTAINER" --container-workdir="$PWD" \
        --container-mounts="$PWD:$PWD$mounts" --no-container-mount-home --container-env="$CONTAINER_ENV" ;;
    esac
    echo "$@"
}

# Of these an image's own values would count before the job's; and a home of the host has packages of its own.
CONTAINER_ENV=PYTHONPATH,PYTHONUNBUFFERED,PYTHONFAULTHANDLER,OMP_NUM_THREADS,MASTER_ADDR,MASTER_PORT,NCCL_DEBUG,NCCL_SOCKET_IFNAME
CONTAINER_ENV+=,GLOO_SOCKET_IFNAME,TORCH_NCCL_ASYNC_ERROR_HANDLING,CUDA_DEVICE_MAX_CONNECTIONS,R1MEGA_SAY_RUN_DIR

log_dir() {
    local parent=${R1MEGA_LOGS:-logs}
    [[ $parent == /* ]] || parent=$PWD/$parent
    echo "$parent/$SLURM_JOB_NAME-$SLURM_JOB_ID"
}

# The environment of every rank, and how many machines (num_nodes) they go to.
prepare_job() {
    local all
    all=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | wc -l)
    if [[ ! ${R1MEGA_SPARE_NODES:-0} =~ ^[0-9]+$ ]] || [ "$((num_nodes = all - ${R1MEGA_SPARE_NODES:-0}))" -lt 1 ]; then
        echo "launch: R1MEGA_SPARE_NODES=$R1MEGA_SPARE_NODES: not fewer than the job's machines ($all); sbatch --nodes: those too" >&2
        exit 2
    fi
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
    local code num_nodes attempt=0 seconds errors why=
    prepare_job
    trap 'interrupted=1; [ "$cancelled" = 1 ] || be_warned' USR1
    trap 'interrupted=1; be_ended' TERM
    trap 'interrupted=1; [ "$cancelled" = 0 ] && requeue_unsaved && { stop_timer; exit "$SAVED"; }' ALRM
    warn_in_time
    while :; do
        errors=$(log_dir)/srun-${SLURM_RESTART_COUNT:-0}.$attempt.log
        start_once "$@"
        [ "$code" = 0 ] && { stop_timer; trap '' ALRM; return; } # the others stay: asked to stop between two stages, the second does not begin
        name_failure "$errors" "$code"
        if [ "$attempt" -gt 0 ] && grep -q 'srun: error: Unable to create step' "$errors"; then
            code=$SAVED why="its machines could not be had within $SECONDS_FOR_MACHINES s"
        fi
        [ "$((warned + cancelled))" = 0 ] && [ -z "$why" ] && seconds=$(seconds_until_restart "$code") || break
        if [ "$(job_nodes | wc -l)" -lt "$num_nodes" ]; then
            code=$SAVED why="too few of its machines are left" && break
        fi
        attempt=$((attempt + 1))
        echo "launch: exit code $code, and a newer checkpoint: starting again in $seconds s${left_out[*]:+, without ${left_out[*]}}" >&2
        wait_for sleep "$seconds"
    done
    stop_timer
    trap - USR1 TERM ALRM
    [ "$warned $code" = "1 $UNHEARD" ] && code=$SAVED why="asked to stop while it started"
    if [ "$code" = "$SAVED" ]; then requeue "$cancelled" "$why"; fi
    exit "$code"
}

# start_once COMMAND...: one start of all ranks; code is how it ended, that of a saved state where the job is to stop before it began.
start_once() {
    local nodes first tasks=${SLURM_NTASKS_PER_NODE:-1}
    nodes=$(job_nodes) first=${nodes%%$'\n'*} nodes=${nodes//$'\n'/,}
    # the address that Slurm itself reaches the machine by; inside a container there is no scontrol to ask
    export MASTER_ADDR=${GIVEN_MASTER:-$(scontrol show node -o "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)}
    set -- "${@//@COUNT@/$num_nodes}"
    set -- "${@//@TASKS@/$((num_nodes * tasks))}"
    set -- "${@//@NODES@/$nodes}"
    [ "$attempt" = 0 ] || export SLURM_IMMEDIATE=$SECONDS_FOR_MACHINES
    : >"$errors"
    rm -f "$R1MEGA_SAY_RUN_DIR" # of the start or the stage before
    [ "$((warned + cancelled))" = 0 ] || { code=$SAVED && return; }
    guard_job
    echo "job $SLURM_JOB_ID on $nodes, start $((${SLURM_RESTART_COUNT:-0} + attempt + 1)); a log for each rank: $(log_dir)/rank-N.log"
    wait_for with_errors_kept "$errors" "$@"
}
GIVEN_MASTER=${MASTER_ADDR:-}

# with_errors_kept FILE COMMAND...: what the command says of errors goes to the file too, and is there when it ends.
with_errors_kept() {
    local file=$1
    shift
    trap : TERM # Slurm's is for the command
    { "$@" 2>&1 >&3 3>&- | (trap '' TERM && exec tee -a "$file" >&2); } 3>&1
    return "${PIPESTATUS[0]}"
}

# job_nodes: where the ranks go, a name a line, in Slurm's order, which is that of the ranks. Fewer than num_nodes where too few are left.
job_nodes() { nodes_left | head -n "$num_nodes"; }
nodes_left() { scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -vxF "$(printf '%s\n' "${left_out[@]-}")"; }

# guard_job: where sbatch's --no-kill keeps the job without its first machine, this script is gone with it, and nobody would start or end
# anything on the others until the time limit. Two of them look whether it is still there, and requeue the job when it is not. Asked at each
# start: guards on machines that are not left any more, or that have ended, are replaced. What srun says of them is in guard.log. They share the ranks' processors, memory and GPUs:
# --overlap does so from Slurm 22.05 on. (--gres=none is refused where the job has SLURM_GPUS_PER_NODE.)
guard_job() {
    local machine wanted number log
    [ "${R1MEGA_SPARE_NODES:-0}" != 0 ] || return 0
    machine=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) log=$(log_dir)/guard.log
    wanted=$(nodes_left | grep -vxF "$machine" | head -n 2) number=$(grep -c . <<<"$wanted") wanted=${wanted//$'\n'/,}
    [ "$wanted" = "$guards" ] && kill -0 "$guard" 2>/dev/null && return
    stop_guard
    [ -n "$wanted" ] || { echo "launch: no other machine is left to look after $machine" >&2; return; }
    guards=$wanted
    trap stop_guard EXIT
    (
        trap 'kill "$child"; exit' TERM
        srun --overlap --no-kill --nodes="$number" --ntasks="$number" --ntasks-per-node=1 --cpus-per-task=1 \
            --nodelist="$wanted" --open-mode=append --output="$(log_dir)/guard-%t.log" bash -c "$(declare -f look_after)
            look_after $machine $SECONDS_BETWEEN_LOOKS ${SLURM_RESTART_COUNT:-0} ${R1MEGA_MAX_REQUEUES:-1000}" </dev/null >>"$log" 2>&1 &
        child=$!
        wait "$child"
        echo "launch: nobody looks after $machine any more (exit code $?; see $log)" >&2
    ) &
    guard=$!
}
stop_guard() { [ -z "$guard" ] || kill "$guard" 2>/dev/null; guard= guards=; }

# look_after MACHINE SECONDS RESTARTS MAX_REQUEUES: requeue the job of this step once the machine is not among its own any more, at two
# looks in a row. Only while the job runs, on this machine too, in the start that has asked for it: one that ends has fewer machines by the
# minute. A job that is not to go back is ended: nobody else is there to do so.
look_after() {
    local job names missing=0
    trap '' USR1 USR2 # the ranks'
    while sleep "$2"; do
        job=" $(scontrol show job -o "$SLURM_JOB_ID") " && [[ $job == *" JobState="* ]] || { missing=0; continue; }
        [[ $job == *" JobState=RUNNING "* && $job == *" Restarts=$3 "* ]] || return 0
        names=$(grep -oE ' NodeList=[^ (]+' <<<"$job") && names=$(scontrol show hostnames "${names#*=}") && [ -n "$names" ] ||
            { missing=0; continue; }
        grep -qxF "$SLURMD_NODENAME" <<<"$names" || return 0
        grep -qxF "$1" <<<"$names" && { missing=0; continue; }
        [ "$((missing += 1))" -gt 1 ] || continue
        if [ "$3" -ge "$4" ] || [[ $job == *" Requeue=0 "* ]]; then
            echo "launch: $1, on which the job's script ran, is gone, and the job is not to go back to the queue: it ends; submit it again"
            scancel "$SLURM_JOB_ID" && return
        else
            echo "launch: $1, on which the job's script ran, is gone: back to the queue"
            scontrol requeue Incomplete "$SLURM_JOB_ID" && return
        fi
    done
}

# wait_for COMMAND...: run it while this shell takes signals; code is how it ended. A sleep ends when the job is to stop.
wait_for() {
    local child interrupted
    "$@" &
    child=$!
    while :; do
        interrupted=0
        [ "$1" = sleep ] && [ "$((warned + cancelled))" != 0 ] && kill "$child" 2>/dev/null
        wait "$child"
        code=$?
        [ "$interrupted" = 1 ] || break
    done
}

# seconds_until_restart CODE: how long until the ranks are started again; fails where they are not to be. Without CODE: whether this
# start has kept something.
seconds_until_restart() {
    local run_dir
    run_dir=$(cat "$R1MEGA_SAY_RUN_DIR" 2>/dev/null) && "$R1MEGA_PYTHON" -m r1mega.observe.restarts "$run_dir" "$@"
}

# be_warned: the end is near, by Slurm's own signal, by warn_in_time (which may be hours before it), or by a person.
be_warned() {
    warned=1
    [ -z "$early" ] || kill "$early" 2>/dev/null
    scancel --signal=USR2 "$SLURM_JOB_ID" # all steps, not this shell
    remind
    limit=${limit:-$(end_of_job)}
}

# be_ended: SIGTERM is a preemption's, the time limit's after its warning, or else scancel's, after which the job stays down: also that of a
# job that was warned, long before its limit. (As it was when it was warned: scancel moves the EndTime that Slurm tells.)
be_ended() {
    scancel --signal=USR2 "$SLURM_JOB_ID"
    if preempted; then
        warned=1
    elif [ "$warned" = 0 ] || [ "$((${limit:-0} - $(date +%s)))" -gt "$SECONDS_OF_CLOCKS" ]; then
        warned=0 cancelled=1
        stop_timer
        stop_guard
    fi
}

# remind: SIGUSR2 again and again, for a step that was not there yet, and SIGALRM to this shell shortly before the time limit. Once a job: a
# second warning changes neither.
remind() {
    [ -z "$timer" ] || return 0
    (
        trap '[ -z "$child" ] || kill "$child"; exit' TERM
        child= end= last=${R1MEGA_LAST_SECONDS:-60} pause=$SECONDS_BETWEEN_REMINDERS
        while :; do
            seconds=$pause now=$(date +%s)
            if [ -z "$end" ] && end=$(end_of_job); then
                last=$((2 * last < end - now ? last : (end - now) / 2))
            fi
            if [ -n "$end" ]; then
                [ "$((end - last))" -le "$now" ] && { kill -ALRM $$; exit; }
                seconds=$((end - last - now < seconds ? end - last - now : seconds))
            fi
            sleep "$seconds" &
            child=$!
            wait "$child"
            scancel --signal=USR2 "$SLURM_JOB_ID"
            pause=$((2 * pause < SECONDS_BETWEEN_LOOKS ? 2 * pause : SECONDS_BETWEEN_LOOKS))
        done
    ) 2>/dev/null &
    timer=$!
}

# end_of_job: when its time is over, in seconds since 1970; fails where it has no limit, or Slurm does not say.
end_of_job() {
    local end
    end=$(scontrol show job -o "$SLURM_JOB_ID" | grep -oE ' EndTime=[0-9][^ ]+' | cut -d= -f2)
    [ -n "$end" ] && date -d "$end" +%s
}

stop_timer() { kill $timer $early 2>/dev/null; timer= early=; }

# warn_in_time: SIGUSR1 to this shell as long before the time limit as the run says that it wants, by its longest step and save so far.
# Slurm's own (--signal) was chosen before that was known, and cannot be changed any more.
warn_in_time() {
    [ -z "$early" ] || return 0
    (
        trap '[ -z "$child" ] || kill "$child"; exit' TERM
        child= end=
        while :; do
            sleep "$SECONDS_BETWEEN_LOOKS" &
            child=$!
            wait "$child"
            kill -0 $$ || exit
            wanted=$(grep -oP '"warning_seconds": \K[0-9]+' "$(cat "$R1MEGA_SAY_RUN_DIR")/pace.json") || continue
            [ -n "$end" ] && [ "$((end - wanted))" -gt "$(date +%s)" ] && continue
            end=$(end_of_job) || continue # asked again when it is near: it may have been moved
            [ "$((end - wanted))" -gt "$(date +%s)" ] || { kill -USR1 $$; exit; }
        done
    ) 2>/dev/null &
    early=$!
}

# requeue_unsaved: the limit is near and the step in hand has not ended. Not where nothing was kept since Slurm started the job: so would
# the next one. (A start again within the job was for something kept.)
requeue_unsaved() {
    if [ "$attempt" = 0 ] && ! seconds_until_restart; then
        echo "launch: the time limit comes before the first checkpoint of this start: another would end so too; give it more time" >&2
        return 1
    fi
    requeue 0 "the step in hand is longer than the warning"
}

# Slurm takes the machines of a running job back: SIGTERM without the warning, where its grace time is shorter than --signal's.
preempted() { [[ "$(scontrol show job -o "$SLURM_JOB_ID")" =~ \ PreemptTime=[0-9] ]]; }

# name_failure FILE CODE: say by srun's own words which rank ended first, and make its exit code the job's: what the others end
# with follows from that one. (One that failed may make the others exit 85; the first that saved has the others terminated.)
# Where Slurm lost machines, what ranks on others say follows from that. Those are left out, and while there are spare ones the rank's.
name_failure() {
    local line rank own lost node
    lost=$(sed -nE 's/.*srun: error: Node failure on ([^ ]*[^ .]).*/\1/p' "$1" | paste -sd, -)
    if [ -n "$lost" ]; then
        left_out+=($(scontrol show hostnames "$lost"))
        [ "$code" = "$SAVED" ] || code=$LOST
        echo "launch: Slurm lost $lost" >&2
        return
    fi
    line=$(grep -E 'srun: error: .* tasks? [0-9,-]+: ' "$1" | head -n 1)
    [ -n "$line" ] || return 0
    own=$(grep -oE 'Exited with exit code [0-9]+' <<<"$line" | grep -oE '[0-9]+$')
    case "${line##*: }" in # srun's own is the highest of all ranks': 143 of one that was terminated for a first one's 137
    Killed*) own=137 ;; Segmentation*) own=139 ;; Aborted*) own=134 ;; Bus*) own=135 ;; Illegal*) own=132 ;; Floating*) own=136 ;;
    User*2*) own=$UNHEARD ;; Out*) own=$LOST ;; # "Out Of Memory": by the kernel's SIGKILL
    esac
    code=${own:-$2}
    [ "$code" = "$SAVED" ] && [ -n "$own" ] && return
    [ "$code" = "$SAVED" ] && code=1
    rank=$(grep -oE 'tasks? [0-9,-]+:' <<<"$line" | grep -oE '[0-9,-]+')
    echo "launch: rank $rank failed first (${line##*: }); see $(log_dir)/rank-${rank%%[,-]*}.log" >&2
    for node in $(scontrol show hostnames "$(sed -E 's/.*srun: error: ([^ ]+): tasks? .*/\1/' <<<"$line")"); do
        [ "$(nodes_left | wc -l)" -le "$num_nodes" ] || left_out+=("$node")
    done
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
        scontrol requeue "$SLURM_JOB_ID" || echo "launch: Slurm does not take the job back; submit it again to go on" >&2
        return 0 # without a number, within a trap, it would be what went before the signal
    fi
    return 1
}
