#!/usr/bin/env bash
# The same set-up as the quickstart, then the tests.   bash launch/test.sh [pytest arguments ...]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
apt_install chromium chromium
apt_install bwrap bubblewrap
apt_install slurmctld slurm-wlm munge
set_up
transformer_engine_files() {  # not into site-packages: megatron-core takes what it finds there for a GPU's
    local lock=requirements/te.lock target wanted
    target=$(dirname "$(dirname "$PYTHON")")/transformer_engine
    wanted=$(sha256sum "$lock" | cut -d' ' -f1)
    [ "$(cat "$target/installed.sha256" 2>/dev/null || true)" != "$wanted" ] || return 0
    rm -rf "$target"
    "$PYTHON" -m pip install -q --no-deps --target "$target" -r "$lock" || fail "pip could not install $lock"
    echo "$wanted" >"$target/installed.sha256"
}
transformer_engine_files
export OMP_NUM_THREADS=1
run_tests() { "$PYTHON" -m pytest -q --durations=15 "$@"; }
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
