#!/usr/bin/env bash
# Distillation: SFT of a dense student on the factory's data.
#   sbatch launch/distill.sh [CONFIG] [key.sub=value ...]      see launch/slurm.sh
#SBATCH --job-name=r1mega-distill
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
run_stages configs/nano/distill.yaml -- "$@"
