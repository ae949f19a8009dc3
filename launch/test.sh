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
if [ "$megatron" ]; then
  base=$(find_python 3.12)
  [ "$base" ] || { say "SKIPPED: megatron-core $megatron (no Python 3.12 found; set R1MEGA_PYTHON to one)"; exit; }
  set_up ".venv-megatron-$megatron" "$base"
  transformer_engine_files
  [ "$only_set_up" ] && exit
  [ $# -gt 0 ] || set -- -m "not slow" tests/unit/{model,platform,train} \
    tests/unit/checkpoint/test_{names,optimizer_state,store,two_versions}.py tests/dist $(ls -d tests/te 2>/dev/null)
  run_tests "$@"
  exit
fi
[ "$only_set_up" ] || { apt_install chromium chromium; apt_install bwrap bubblewrap; apt_install slurmctld slurm-wlm munge; }
set_up
transformer_engine_files
[ "$only_set_up" ] && exit
if [ $# -gt 0 ]; then
  run_tests "$@"
  exit
fi
# Everything: the unit tests beside the others, a core for each; what they print follows at the end.
printed=$(mktemp)
run_tests tests/unit > "$printed" 2>&1 &
unit=$!
trap 'kill $unit 2> /dev/null || true; rm -f "$printed"' EXIT  # a trap that fails would be the exit code
code=0
run_tests --ignore=tests/unit || code=$?
wait $unit || code=$?
cat "$printed"
exit $code
