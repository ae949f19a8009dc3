#!/usr/bin/env bash
# Stage 1: the cold start: readable reasoning made from R1-Zero, SFT of the base on it.
#   sbatch launch/stage1.sh [CONFIG] [key.sub=value ...]      see launch/slurm.sh
# CONFIG is one of its two configs (cold_start.yaml, then cold_start_sft.yaml); without one, both of configs/nano.
#SBATCH --job-name=r1mega-stage1
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
run_stages configs/nano/cold_start.yaml configs/nano/cold_start_sft.yaml -- "$@"
