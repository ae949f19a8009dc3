#!/usr/bin/env bash
# The same set-up as the quickstart, then the tests.   bash launch/test.sh [pytest arguments ...]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
apt_install chromium chromium
apt_install bwrap bubblewrap
apt_install slurmctld slurm-wlm munge
set_up
export OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest -q --durations=15 "$@"
