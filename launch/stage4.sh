#!/usr/bin/env bash
# Stage 4: the reward models, then RL for all scenarios.
#   sbatch launch/stage4.sh [CONFIG] [key.sub=value ...]      see launch/slurm.sh
# CONFIG is one of its three configs (reward_helpful.yaml, reward_harmless.yaml, align.yaml); without one, all of configs/nano.
#SBATCH --job-name=r1mega-stage4
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
source "${R1MEGA_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}/launch/slurm.sh" || exit 2
run_stages configs/nano/reward_helpful.yaml configs/nano/reward_harmless.yaml configs/nano/align.yaml -- "$@"
