#!/usr/bin/env bash
# Finds or makes the Python environment. The other scripts source this one; alone: bash run_scripts/setup.sh
# Sets ROOT (the repository) and PYTHON (the interpreter), and prints which interpreter it is and why.
#   1. If python3 or python on PATH, say of an active environment, has all of requirements.txt, it is used as it is.
#   2. Otherwise .venv, or the folder KAT_VENV, is made from requirements.txt and constraints.txt. Its stamp is written
#      last: later calls are quick, and an interrupted set-up continues at the next call.
set -euo pipefail

ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${KAT_VENV:-$ROOT/.venv}
[[ $VENV = /* ]] || VENV=$PWD/$VENV
DISK_GB=${KAT_DISK_GB:-12}  # 3 GB of wheels, most of them CUDA, become 6 GB

die() { echo "setup: $*" >&2; exit 1; }
check() { "$1" "$ROOT/run_scripts/check_env.py" 2>/dev/null; }
stamp() { "$VENV/bin/python" --version && cat "$ROOT/requirements.txt" "$ROOT/constraints.txt"; }
up_to_date() { [ -f "$VENV/setup_stamp" ] && [ "$(stamp 2>&1)" = "$(cat "$VENV/setup_stamp")" ]; }

make_venv() {
    local base free
    for base in python3 python python3.14 python3.13 python3.12 python3.11 python3.10 ''; do
        "$base" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2>/dev/null && break
    done
    [ "$base" ] ||
        die "there is no Python 3.10 to 3.14 (${reason:-no python3 on PATH}). Install one (Debian, Ubuntu:" \
            "apt install python3 python3-venv), or activate an environment that has one."
    if [ -e "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ] && [ "$(ls -A "$VENV")" ]; then
        die "$VENV is not a virtual environment. Move it away, or name another folder with KAT_VENV=folder."
    fi
    mkdir -p "$VENV"
    free=$(df -Pk "$VENV" | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "${free:-$DISK_GB}" -ge "$DISK_GB" ] ||
        die "the disk of $VENV has $free GB left, and PyTorch with CUDA needs about $DISK_GB GB to install. Free some" \
            "space, name a folder on another disk with KAT_VENV=folder, or activate an environment that has all of" \
            "requirements.txt."
    "$base" -m venv --clear "$VENV" >&2 ||
        die "$base cannot make a virtual environment, see above. Debian, Ubuntu: apt install python3-venv"
}

fill_venv() {
    local attempt why
    for attempt in 1 2; do
        "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
        echo "setup: installing requirements.txt into $VENV (about 3 GB to download, once)"
        rm -rf "$VENV/setup_stamp" "$VENV/tmp"
        mkdir "$VENV/tmp"  # /tmp may be too small
        TMPDIR=$VENV/tmp PIP_USER=0 "$VENV/bin/python" -m pip install -q --no-input --disable-pip-version-check \
            -r "$ROOT/requirements.txt" -c "$ROOT/constraints.txt" ||
            die "pip could not install the requirements, see above. Is there a network, and disk space?" \
                "Run the same command again to continue."
        rm -rf "$VENV/tmp"
        if why=$(check "$VENV/bin/python"); then stamp >"$VENV/setup_stamp"; return; fi
        # A package is incomplete and pip does not notice: the second attempt starts from nothing.
        rm -rf "$VENV/bin"
    done
    die "$VENV was just installed, but it ${why:-cannot run check_env.py}."
}

PYTHON='' reason=''
for candidate in python3 python; do
    if ! command -v "$candidate" >/dev/null; then continue; fi
    if found=$(check "$candidate"); then
        PYTHON=$("$candidate" -c 'import sys; print(sys.executable)')
        reason="it $found"
        break
    fi
    reason=${reason:-"$candidate on PATH ${found:-cannot run check_env.py}"}
done
if [ ! "$PYTHON" ]; then
    # The lock lets one set-up run at a time.
    exec 9<"$ROOT/requirements.txt"
    if command -v flock >/dev/null && ! flock -n 9; then
        echo "setup: waiting for another set-up to finish"
        flock 9 || true
    fi
    up_to_date || fill_venv
    exec 9<&-
    PYTHON=$VENV/bin/python
fi
echo "setup: using $PYTHON (${reason:-no python3 on PATH})"
