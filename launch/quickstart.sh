#!/usr/bin/env bash
# The main job on one CPU machine: set up, run the nano pipeline, report.
#
#   bash launch/quickstart.sh [--stage NODE] [--quiet] [node.key.sub=value ...]     overrides of configs/nano/r1.yaml and its stages
#
# After the set-up it is `r1mega quickstart`. It runs the stages up to NODE (default: evaluate, the last; `--stage zero`: R1-Zero
# only, ten minutes). SEED (default 1) is the seed of every stage; RUNS (default runs/nano) is where they go. Started again it
# installs nothing twice and goes on where it was cut short.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up
exec r1mega quickstart --dir "${RUNS:-runs/nano}" --seed "${SEED:-1}" "$@"
