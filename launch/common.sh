# Set-up shared by the launch scripts; source it. Leaves $PYTHON (of the repository's own .venv) and changes to the root.
# Installs only what changed: the lock file's hash is kept inside .venv. The lock holds megatron-core 0.16.1 for Python 3.11
# and 0.19.2 for 3.12.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\033[1m%s\033[0m\n' "$*"; }
fail() { printf 'launch: %s\n' "$*" >&2; exit 1; }

# find_python [VERSION]: an interpreter of Python 3.11 (preferred) or 3.12, or of VERSION; nothing where there is none.
find_python() {
    local candidate wanted=${1:-}
    for candidate in "${R1MEGA_PYTHON:-}" ${wanted:+"python$wanted"} python3.11 python3.12 python3 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[12].*/bin/python; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null || continue
        case $("$candidate" -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null) in
            "${wanted:-3.11}" | "${wanted:-3.12}") command -v "$candidate"; return ;;
        esac
    done
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

# make_venv [VENV PYTHON]: VENV (.venv) with pip, made with PYTHON (what find_python finds); leaves $PYTHON.
make_venv() {
    local venv=${1:-.venv} base=${2:-}
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then # also after a set-up that could not make it whole
        rm -rf "$venv"
        base=${base:-$(find_python)}
        [ -n "${2:-}" ] || [ -z "${R1MEGA_PYTHON:-}" ] || [ "$base" = "$(command -v "$R1MEGA_PYTHON")" ] ||
            say "R1MEGA_PYTHON=$R1MEGA_PYTHON is no Python 3.11 or 3.12"
        [ -n "$base" ] || fail "no Python 3.11 or 3.12 found; install one (Debian 12: apt-get install python3 python3-venv) or set R1MEGA_PYTHON"
        say "making $venv with $base"
        if ! "$base" -m venv "$venv" 2>/dev/null; then  # Debian keeps ensurepip in a package of its own
            apt_get python3-venv || true
            rm -rf "$venv"
            "$base" -m venv "$venv" || fail "cannot make a virtual environment; apt-get install python3-venv"
        fi
    fi
    PYTHON=$PWD/$venv/bin/python
    export PATH="$PWD/$venv/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1
}

# pip_install ARGUMENT...: without dependencies, and without a word on folders of an index that lacks a package.
pip_install() { "$PYTHON" -m pip install -q --no-deps "$@" 2> >(grep -v 'is ignored: it is neither' >&2); }

# compile_packages: all that is installed, on all cores, where pip takes a minute of one; what cannot be compiled, and warnings, are no matter to it either.
compile_packages() { "$PYTHON" -W ignore -m compileall -qq -j 0 "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || true; }

# set_up [VENV PYTHON]: make_venv, the pinned packages, and this one.
set_up() {
    local venv=${1:-.venv} lock=requirements/cpu.lock stamp wanted
    stamp=$venv/installed.sha256
    wanted=$(find "$lock" setup.py kernels -type f ! -name '*.so' ! -name '*.pyc' ! -name '*.tmp' | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -d' ' -f1)
    make_venv "$@"
    if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
        say "installing the pinned packages (about 4 GB on disk, a few minutes, once)"
        pip_install --no-compile -r "$lock" ||
            fail "pip could not install $lock; is a package index reachable? Start again to go on where it stopped."
        [ -n "${2:-}" ] || compile_packages
        [ -e /dev/nvidiactl ] || "$PYTHON" -c 'import torch' 2>/dev/null || "$PYTHON" launch/cuda_stand_ins.py
        "$PYTHON" -c 'import torch' 2>/dev/null ||
            fail "torch does not load: the package index served a CUDA build. Set PIP_EXTRA_INDEX_URL to PyTorch's own index of CPU wheels (pytorch.org, Get Started: pip, CPU), remove $venv and start again."
        if [ -n "${2:-}" ] && [ -e kernels/r1mega_kernels/_cpu.so ]; then # built with .venv, whose tests may have it loaded
            printf '%s\n' "$PWD" "$PWD/kernels" >"$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/r1mega.pth"
        else
            pip_install --no-build-isolation -e .
        fi
        echo "$wanted" >"$stamp"
    fi
    export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}" HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" PYTHONDONTWRITEBYTECODE=
    # with the last one set, as in some containers, every process would compile what is not compiled there (VENV): 27 s a start
}

# transformer_engine_files: its Python files, for tests/te, beside those of $PYTHON.
transformer_engine_files() {  # not into site-packages: for these tests alone
    local lock=requirements/te.lock target wanted
    target=$(dirname "$(dirname "$PYTHON")")/transformer_engine
    wanted=$(sha256sum "$lock" | cut -d' ' -f1)
    [ "$(cat "$target/installed.sha256" 2>/dev/null || true)" != "$wanted" ] || return 0
    rm -rf "$target"
    pip_install --target "$target" -r "$lock" || fail "pip could not install $lock"
    echo "$wanted" >"$target/installed.sha256"
}
