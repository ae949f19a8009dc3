#!/usr/bin/env bash
# The same set-up as the quickstart, then the tests.   bash launch/test.sh [--megatron 0.19] [--set-up] [pytest arguments ...]
#   --megatron 0.19   with the other supported megatron-core, on Python 3.12, the tests that depend on it
#   --set-up          install, run nothing
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
megatron='' only_set_up=''
while [ $# -gt 0 ]; do
  case $1 in
    --megatron) megatron=${2:-}; [ "$megatron" = 0.19 ] || fail "--megatron is '$megatron'; the one beside the default is 0.19"; shift 2 ;;
    --set-up) only_set_up=yes; shift ;;
    *) break ;;
  esac
done
export OMP_NUM_THREADS=1
run_tests() { "$PYTHON" -m pytest -q --durations=15 "$@"; }

# run_beside ARGUMENTS ... -- ARGUMENTS ...: two runs side by side, a core for each; what the first prints follows at the end.
run_beside() {
  local first=() printed code=0
  while [ "$1" != -- ]; do first+=("$1"); shift; done
  shift
  printed=$(mktemp)
  run_tests "${first[@]}" > "$printed" 2>&1 &
  beside=$!
  trap 'kill $beside 2> /dev/null || true' EXIT  # a trap that fails would be the exit code
  run_tests "$@" || code=$?
  wait $beside || code=$?
  cat "$printed"
  rm -f "$printed"
  exit $code
}

if [ "$megatron" ]; then
  base=$(find_python 3.12)
  [ "$base" ] || { say "SKIPPED: megatron-core $megatron (no Python 3.12 found; set R1MEGA_PYTHON to one)"; exit; }
  set_up ".venv-megatron-$megatron" "$base"
else
  [ "$only_set_up" ] || { apt_install chromium chromium; apt_install bwrap bubblewrap; apt_install slurmctld slurm-wlm munge; }
  set_up
fi
transformer_engine_files
[ "$only_set_up" ] && exit
if [ $# -gt 0 ]; then
  run_tests "$@"
elif [ "$megatron" ]; then
  run_beside -m "not slow" tests/unit/{model,platform,train} \
    tests/unit/checkpoint/test_{names,optimizer_state,store,two_versions}.py -- -m "not slow" \
    tests/dist/test_{layouts,policy_layouts,optimizer_state}.py tests/te/test_{operations,policy_layouts}.py
else
  run_beside tests/unit tests/te -- --ignore=tests/unit --ignore=tests/te
fi
