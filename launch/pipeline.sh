#!/usr/bin/env bash
# A whole recipe, a job for each of its stages, each starting when the ones it reads from have ended well.
#
#   bash launch/pipeline.sh PIPELINE [node.key.sub=value ...] [options of r1mega pipeline]     such as configs/moonlight_16b/r1.yaml
#
# Machines and ranks come from the file; partition, account and time from SBATCH_* variables. Started again after a failure
# it submits what is not finished. Without Slurm the stages run here, one after the other.
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
#SBATCH --open-mode=append
source "${R1MEGA_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}/launch/slurm.sh" || exit 2
[ $# -gt 0 ] || { echo "usage: bash launch/pipeline.sh PIPELINE [node.key.sub=value ...]" >&2; exit 2; }

if [ -n "${R1MEGA_NODE:-}" ]; then # inside the job of one stage
    run_in_job "$R1MEGA_PYTHON" -m r1mega pipeline "$@" --only "$R1MEGA_NODE" --launcher "$(rank_launcher)" --rank-python "$RANK_PYTHON"
    exit
fi
if ! command -v sbatch >/dev/null || [[ " $* " == *" --dry-run "* ]]; then
    exec "$R1MEGA_PYTHON" -m r1mega pipeline "$@"
fi
mkdir -p "${R1MEGA_LOGS:-logs}"
spare=${R1MEGA_SPARE_NODES:-0} # for each stage
declare -A submitted
plan=$("$R1MEGA_PYTHON" -m r1mega pipeline "$@" --jobs) || exit
while IFS=$'\t' read -r node machines ranks parents; do
    [ -n "$node" ] || continue
    after=
    for parent in ${parents//,/ }; do
        [ "$parent" = - ] || after+=":${submitted[$parent]}"
    done
    job=$(R1MEGA_NODE=$node sbatch --parsable --job-name="r1mega-$node" --nodes="$((machines + spare))" --ntasks-per-node="$ranks" \
        --gpus-per-node="$ranks" $([ "$spare" = 0 ] || echo --no-kill) \
        --output="${R1MEGA_LOGS:-logs}/%x-%j.out" ${after:+--dependency=afterok$after --kill-on-invalid-dep=yes} launch/pipeline.sh "$@") || exit
    submitted[$node]=${job%%;*}
    echo "$node: job ${submitted[$node]}${after:+, after${after//:/ }}"
done <<<"$plan"
