#!/usr/bin/env bash
# The main job on one CPU machine: set up, run the nano pipeline, report.
#
#   bash launch/quickstart.sh [--stage NODE] [node.key.sub=value ...]     overrides of configs/nano/r1.yaml and its stages
#
# It runs the stages up to NODE (default: evaluate, the last; `--stage zero`: R1-Zero only, ten minutes). SEED (default 1) is the
# seed of every stage; RUNS (default runs/nano) is where they go. Started again it installs nothing twice and goes on where it was
# cut short.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
STAGE=evaluate
case "${1:-}" in
--stage) STAGE=${2:?--stage wants the name of a node of configs/nano/r1.yaml} && shift 2 ;;
--stage=*) STAGE=${1#--stage=} && shift ;;
esac
set_up
exec r1mega pipeline configs/nano/r1.yaml --until "$STAGE" dir="${RUNS:-runs/nano}" overrides.seed="${SEED:-1}" "$@"
