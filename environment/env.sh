#!/usr/bin/env bash
# Make or bring up to date .venv from the lock files, and from nothing else:
#   env.sh cpu|cuda [python]   the environment with that build of torch, and memlib itself
#   env.sh browser             what the tests in a real browser need, Chromium too where apt may install it
#   env.sh compiler            a C++ compiler, where there is none and apt may install it
#   env.sh extras              what the pretrained extra adds to it
#   env.sh evaluation          what the evaluation extra adds to that
# `make env`, `make browser`, `make extras` and `make evaluation` run this when a lock file has changed;
# `make compiler` runs it always.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
log=.venv/install.log
export PIP_DISABLE_PIP_VERSION_CHECK=1

stop() {
    printf '%s\n' "$@" >&2
    exit 1
}

# One line for each step, with its seconds; the end of the log where it fails.
step() {
    local what=$1 start=$SECONDS
    shift
    printf '  %-58s' "$what"
    if "$@" >>"$log" 2>&1; then
        printf '%4d s\n' $((SECONDS - start))
    else
        printf 'failed\n'
        grep -v '^Requirement already satisfied' "$log" | tail -n 20 >&2
        stop "" "That was the end of $PWD/$log. The same command again takes up where this one stopped."
    fi
}

# --no-deps and the hashes: nothing is installed that the lock does not name.
install() {
    "$python" -m pip install --progress-bar off --no-compile --no-deps --require-hashes \
        -r "environment/$1" "${@:2}"
}

# Left to pip this takes one core, left to the imports it slows each one down. What packages bring to
# test themselves is a quarter of it, and a file for a later Python, which does not compile, no fault.
compile() {
    "$python" -m compileall -qq -j 0 -x '/(tests?|testing/_internal)/' .venv/lib || true
}

apt_install() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q update && apt-get -qy -o DPkg::Lock::Timeout=600 install --no-install-recommends "$@"
}

may_apt() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null
}

# The minor versions of 3 that pyproject.toml allows, oldest first. The oldest is preferred: the stored
# results of the notebooks come from it.
versions=$(sed -n 's/^requires-python = ">=3\.\([0-9]*\),<3\.\([0-9]*\)"$/\1 \2/p' pyproject.toml)
versions=$(seq "${versions% *}" $((${versions#* } - 1)))
oldest=3.${versions%%$'\n'*}
newest=3.${versions##*$'\n'}

is_supported() {
    # shellcheck disable=SC2086
    "$1" -c 'import sys; sys.exit(str(sys.version_info[1]) not in sys.argv)' $versions 2>/dev/null
}

# The command that brings a supported Python to this machine.
how_to_install() {
    local minor
    for minor in $versions; do
        if apt-cache show "python3.$minor-venv" >/dev/null 2>&1; then
            echo "sudo apt-get install python3.$minor-venv"
            return
        fi
    done
    if command -v brew >/dev/null; then
        echo "brew install python@$newest"
    else
        echo "python3 -m pip install --user uv && python3 -m uv python install $newest"
    fi
}

find_python() {
    local candidate
    # shellcheck disable=SC2086
    for candidate in ${1:-$(printf 'python3.%s ' $versions) python3 python}; do
        if is_supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    stop "memlib needs Python $oldest to $newest; found $("${1:-python3}" --version 2>&1 || true) (${1:-python3})." \
        "This installs one:" "  $(how_to_install)" \
        "Or name one that is here:" "  make env PYTHON=/path/to/python$newest"
}

make_venv() {
    local base
    base=$(find_python "${1:-}")
    "$base" -c 'import ensurepip, venv' 2>/dev/null || stop \
        "$("$base" --version) at $(command -v "$base") cannot make virtual environments: it has no ensurepip." \
        "On Debian and Ubuntu: apt-get install $("$base" -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')"
    rm -rf .venv && mkdir .venv
    step "virtual environment, $("$base" --version)" "$base" -m venv --prompt memlib .venv
}

if [ "$1" = browser ]; then
    step "packages for the browser tests" install browser.txt
    if ! command -v chromium chromium-browser google-chrome >/dev/null; then
        may_apt || stop "No Chromium found. Debian and Ubuntu: sudo apt-get install chromium"
        step "Chromium" apt_install chromium
    fi
    step "check that all fit together" "$python" -m pip check
    touch .venv/.locked-browser
    exit
fi

if [ "$1" = compiler ]; then
    if ! command -v "${CXX:-g++}" >/dev/null; then
        may_apt || stop "No C++ compiler found. Debian and Ubuntu: sudo apt-get install g++"
        step "g++" apt_install g++ libc6-dev
    fi
    exit
fi

if [ "$1" = extras ]; then
    step "packages for pretrained models and comparisons" install extras.txt
    step "compile them" compile
    step "check that all fit together" "$python" -m pip check
    touch .venv/.locked-extras
    exit
fi

if [ "$1" = evaluation ]; then
    # Three of them come as source: the setuptools of base.txt builds them.
    step "packages for standard benchmarks" install evaluation.txt --no-build-isolation
    step "compile them" compile
    step "check that all fit together" "$python" -m pip check
    touch .venv/.locked-evaluation
    exit
fi

torch=$1
other=$([ "$torch" = cpu ] && echo cuda || echo cpu)
echo "Making .venv from the lock (the first time: 3 GB, with CUDA 6, and 2 to 5 minutes)"
if ! is_supported "$python" || ! "$python" -m pip --version >/dev/null 2>&1; then
    make_venv "${2:-}"
fi
# pip takes either build for the other: 2.13.0+cpu satisfies ==2.13.0.
if [ -e ".venv/.locked-$other" ]; then
    step "remove torch, $other build" "$python" -m pip uninstall -y -r "environment/torch-$other.txt"
    rm ".venv/.locked-$other"
fi
step "packages" install base.txt
step "torch ($torch build) and Triton" install "torch-$torch.txt"
step "compile them" compile
step "memlib" "$python" -m pip install --no-index --no-deps --no-build-isolation -e .
step "check that all fit together" "$python" -m pip check
touch ".venv/.locked-$torch"
