#!/usr/bin/env bash
# Finds or makes the Python environment. Sourced by quickstart.sh and test.sh; works alone too: bash run_scripts/setup.sh
# Sets ROOT (the repository) and PYTHON (the interpreter to use), and prints one line: which environment, and why.
#   1. If python3 or python on PATH (say, of an active virtualenv or conda environment) has all of requirements.txt,
#      it is used as it is. Nothing is ever installed into it.
#   2. Otherwise .venv at the repository root (KAT_VENV=folder: elsewhere), made from requirements.txt + constraints.txt
#      and kept while these do not change. Its stamp is written last: an interrupted set-up is taken up again.
set -euo pipefail

ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${KAT_VENV:-$ROOT/.venv}
[[ $VENV = /* ]] || VENV=$PWD/$VENV
DISK_GB=${KAT_DISK_GB:-12} DOWNLOAD_GB=3  # of PyPI's Linux wheels, most of it CUDA; 6 GB once installed

die() { echo "setup: $*" >&2; exit 1; }
version_within() { "$1" -c "import sys; sys.exit(not ($2) <= sys.version_info[:2] <= ($3))" 2>/dev/null; }
check() { "$1" "$ROOT/run_scripts/check_env.py" "$ROOT/requirements.txt" 2>/dev/null; }  # prints one line
fingerprint() {
    "$VENV/bin/python" -c 'import hashlib, sys
print(*sys.version_info[:2], hashlib.sha256(b"".join(open(f, "rb").read() for f in sys.argv[1:])).hexdigest())' \
        "$ROOT/requirements.txt" "$ROOT/constraints.txt"
}
up_to_date() { [ -f "$VENV/setup_stamp" ] && [ "$(fingerprint 2>&1)" = "$(cat "$VENV/setup_stamp")" ]; }
usable() { "$VENV/bin/python" -c 'import os, sys, sysconfig; sys.exit(not os.path.isdir(sysconfig.get_path("purelib")))' 2>/dev/null; }

make_venv() {
    local free
    if [ -e "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ] && [ "$(ls -A "$VENV")" ]; then
        die "$VENV exists and is no virtual environment. Move it away, or name another folder with KAT_VENV=folder."
    fi
    mkdir -p "$(dirname "$VENV")"
    free=$(df -Pk "$(dirname "$VENV")" | awk 'NR == 2 { print int($4 / 1048576) }')
    if [ "$(uname)" = Linux ] && [ "${free:-999}" -lt "$DISK_GB" ]; then
        die "$VENV has $free GB of disk left, and PyTorch with CUDA needs about $DISK_GB GB to install. Free some," \
            "name a folder on another disk with KAT_VENV=folder, or activate an environment that has all of requirements.txt."
    fi
    "$1" -m venv --clear --without-pip "$VENV" || die "$1 cannot make a virtual environment. Debian, Ubuntu: apt install python3-venv"
}

bring_pip() {  # Debian keeps ensurepip apart, in python3-venv: without it the pip outside installs the one inside
    local pip
    if "$VENV/bin/python" -m pip --version || "$VENV/bin/python" -m ensurepip --default-pip; then return; fi >/dev/null 2>&1
    pip=$("$1" -c 'import os, pip; print(os.path.dirname(pip.__file__))' 2>/dev/null) ||
        die "$1 has neither ensurepip nor pip. Debian, Ubuntu: apt install python3-venv"
    "$VENV/bin/python" "$pip" install -q --ignore-installed pip || die "could not install pip, the message is above. Is there a network?"
}

install_requirements() {
    echo "setup: installing requirements into $VENV (about $DOWNLOAD_GB GB to download, once)"
    rm -rf "$VENV/tmp"
    mkdir "$VENV/tmp"  # /tmp may be small
    export PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
    TMPDIR=$VENV/tmp "$VENV/bin/python" -m pip install -q -r "$ROOT/requirements.txt" -c "$ROOT/constraints.txt" ||
        die "pip could not install the requirements, its message is above. Is there a network, and space left? Run this again to go on."
    rm -rf "$VENV/tmp"
}

build_venv() {
    local base='' candidate why state=old
    for candidate in python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do
        if version_within "$candidate" '3, 10' '3, 14'; then base=$candidate; break; fi
    done
    [ "$base" ] || die "needs Python 3.10 to 3.14 ($reason). Install one (Debian, Ubuntu: apt install python3 python3-venv)" \
        "or activate an environment that has one."
    rm -f "$VENV/setup_stamp"
    if ! usable; then state=none; fi
    while true; do
        if [ $state = none ]; then make_venv "$base"; state=new; fi
        bring_pip "$base"
        install_requirements
        if why=$(check "$VENV/bin/python"); then break; fi
        [ $state = old ] || die "$VENV was just installed and ${why:-crashes on import}."
        echo "setup: making $VENV anew, because it ${why:-crashes on import}"
        state=none
    done
    fingerprint >"$VENV/setup_stamp"
}

PYTHON='' reason=''
for candidate in python3 python; do
    if ! command -v "$candidate" >/dev/null; then continue; fi
    if ! version_within "$candidate" '3, 10' '99, 0'; then
        reason=${reason:-"$candidate on PATH is not Python 3.10 or newer"}
    elif found=$(check "$candidate"); then
        PYTHON=$("$candidate" -c 'import sys; print(sys.executable)')
        reason="it $found"
        break
    else
        reason=${reason:-"$candidate on PATH ${found:-crashes on import}"}
    fi
done
reason=${reason:-no python3 on PATH}
if [ ! "$PYTHON" ]; then
    if ! up_to_date; then
        exec 9<"$ROOT/requirements.txt"  # one set-up at a time
        if command -v flock >/dev/null && ! flock -n 9; then
            echo "setup: waiting for another set-up to finish"
            flock 9 || true
        fi
        up_to_date || build_venv
        exec 9<&-
    fi
    PYTHON=$VENV/bin/python
fi
echo "setup: using $PYTHON ($reason)"
