#!/usr/bin/env bash
# Stage 3: rejection sampling, then SFT of the base on what it kept.
#   sbatch launch/stage3.sh [CONFIG] [key.sub=value ...]      see launch/slurm.sh
# CONFIG is one of its two configs (rejection_sampling.yaml, then sft.yaml); without one, both of configs/nano.
#SBATCH --job-name=r1mega-stage3
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
run_stages configs/nano/rejection_sampling.yaml configs/nano/sft.yaml -- "$@"
