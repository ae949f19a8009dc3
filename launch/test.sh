#!/usr/bin/env bash
# The same set-up as the quickstart, then the tests.   bash launch/test.sh [--fast | --megatron 0.19 | --both] [--set-up] [pytest arguments ...]
#   --fast            the unit tests that are not heavy (tests/unit/conftest.py), meant to take under a minute and a half
#   --megatron 0.19   with the other supported megatron-core, on Python 3.12, the tests that depend on it
#   --both            everything, and beside it what --megatron 0.19 runs
#   --set-up          install, run nothing
script=$(realpath "${BASH_SOURCE[0]}")
source "$(dirname "$script")/common.sh"
megatron='' only_set_up='' fast='' both=''
while [ $# -gt 0 ]; do
  case $1 in
    --megatron) megatron=${2:-}; [ "$megatron" = 0.19 ] || fail "--megatron is '$megatron'; the one beside the default is 0.19"; shift 2 ;;
    --set-up) only_set_up=yes; shift ;;
    --fast) fast=yes; shift ;;
    --both) both=yes; shift ;;
    *) break ;;
  esac
done
export OMP_NUM_THREADS=1
run_tests() { "$PYTHON" -m pytest -q --durations=15 "$@"; }

# run_beside ARGUMENTS ...: a pytest run of each (of this script where they begin with --megatron), LANES at a time: a core each, of 2
# to 4, and with --both one more, or cores would idle while tests of Slurm and the watchdog wait. What a run prints comes when it ends.
run_beside() {
  export PYTHON script
  local cores lanes
  cores=$(env -u OMP_NUM_THREADS nproc)  # nproc heeds that variable
  lanes=$((cores < 2 ? 2 : cores > 4 ? 4 : cores))
  printf '%s\n' "$@" | xargs -P "${LANES:-$((lanes + 0${both:+1}))}" -d '\n' -n 1 bash -c '
    case $0 in --megatron*) run=(env LANES=1 bash "$script") ;; *) run=("$PYTHON" -m pytest -q --durations=15) ;; esac
    printed=$("${run[@]}" $0 2>&1) && code=0 || code=1
    printf "== %s (%d s)\n%s\n" "$0" $SECONDS "$printed"
    exit $code' || exit 1
}

case $fast$megatron$both in yesyes* | yes0* | 0*yes) fail "--fast, --megatron and --both are one or the other" ;; esac
[ "$both" ] && [ $# -gt 0 ] && fail "--both runs everything; leave $* out"
if [ "$megatron" ]; then
  base=$(find_python 3.12)
  [ "$base" ] || { say "SKIPPED: megatron-core $megatron (no Python 3.12 found; set R1MEGA_PYTHON to one)"; exit; }
  set_up ".venv-megatron-$megatron" "$base"
elif [ "$fast" ]; then
  set_up
else
  [ "$only_set_up" ] || { apt_install chromium chromium; apt_install bwrap bubblewrap; apt_install slurmctld slurm-wlm munge; }
  set_up
fi
[ "$fast" ] || transformer_engine_files
[ "$only_set_up" ] && exit
half=$(echo tests/unit/{config,kernels,model,observe,plan,platform,train})  # of the time of --fast
if [ "$fast" ]; then
  export PYTEST_ADDOPTS='-m "not heavy"'
  if [ $# -gt 0 ]; then
    run_tests "$@"
  else
    run_beside "$half" "tests/unit $(printf -- '--ignore=%s ' $half)"
  fi
elif [ $# -gt 0 ]; then
  run_tests "$@"
elif [ "$megatron" ]; then
  export PYTEST_ADDOPTS='-m "not slow"'
  apart=--ignore=tests/unit/platform/test_vllm_contract.py  # the same vLLM, and no Megatron
  run_beside "$(echo tests/dist/test_{layouts,policy_layouts,optimizer_state}.py tests/te/test_{operations,rows,policy_layouts}.py)" \
    "$apart $(echo tests/unit/checkpoint/test_{hf_state,optimizer_state,store,two_versions}.py tests/unit/{platform,train,model})"
else
  engines=$(echo tests/unit/{evaluate,rollout,weights})
  others="tests/unit $(printf -- '--ignore=%s ' $engines $half)"
  run_beside tests/e2e tests/dist ${both:+"--megatron 0.19"} "$engines" tests/slurm "$others" "$half" tests/te tests/field tests/faults tests/gpu  # the longest first
fi
