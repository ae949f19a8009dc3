# Set-up shared by the launch scripts; source it. Leaves $PYTHON (of the repository's own .venv) and changes to the root.
# Installs only what changed: the lock file's hash is kept inside .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\033[1m%s\033[0m\n' "$*"; }
fail() { printf 'launch: %s\n' "$*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in "${R1MEGA_PYTHON:-}" python3.11 python3.12 python3; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null || continue
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or 3.12 found; install one (Debian 12: apt-get install python3 python3-venv) or set R1MEGA_PYTHON"
}

# apt_get PACKAGE...: install Debian packages, where this user may.
apt_get() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    say "installing $*"
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends "$@"; } >/tmp/r1mega-apt.log 2>&1 ||
        { printf 'launch: apt-get could not install %s, see /tmp/r1mega-apt.log\n' "$*" >&2; return 1; }
}

# apt_install PROGRAM PACKAGE...: make PROGRAM available where that is possible without asking; otherwise say so once.
apt_install() {
    local program=$1
    shift
    command -v "$program" >/dev/null && return
    apt_get "$@" ||
        printf 'launch: %s is not here; what needs it is skipped by name (apt-get install %s)\n' "$program" "$*" >&2
}

# make_venv: .venv with pip; leaves $PYTHON.
make_venv() {
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # also after a set-up that could not make it whole
        rm -rf .venv
        local base
        base=$(find_python)
        say "making .venv with $base"
        if ! "$base" -m venv .venv 2>/dev/null; then  # Debian keeps ensurepip in a package of its own
            apt_get python3-venv || true
            rm -rf .venv
            "$base" -m venv .venv || fail "cannot make a virtual environment; apt-get install python3-venv"
        fi
    fi
    PYTHON=$PWD/.venv/bin/python
    export PATH="$PWD/.venv/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1
}

set_up() {
    local lock=requirements/cpu.lock stamp=.venv/installed.sha256 wanted
    wanted=$(find "$lock" setup.py kernels -type f ! -name '*.so' ! -name '*.pyc' | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -d' ' -f1)
    make_venv
    if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
        say "installing the pinned packages (about 3 GB on disk, a few minutes, once)"
        "$PYTHON" -m pip install -q --no-deps -r "$lock" 2> >(grep -v 'is ignored: it is neither' >&2) ||
            fail "pip could not install $lock; is a package index reachable? Start again to go on where it stopped."
        "$PYTHON" -c 'import torch' 2>/dev/null ||
            fail "torch does not load: the package index served a CUDA build. Set PIP_EXTRA_INDEX_URL to PyTorch's own index of CPU wheels (pytorch.org, Get Started: pip, CPU), remove .venv and start again."
        "$PYTHON" -m pip install -q --no-deps --no-build-isolation -e . 2> >(grep -v 'is ignored: it is neither' >&2)
        echo "$wanted" >"$stamp"
    fi
    export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}" HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
}
