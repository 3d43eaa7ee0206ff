#!/usr/bin/env bash
# What a container of the image runs:
#   entrypoint.sh lab [options of JupyterLab]     the lab, on notebooks in the work folder (the default)
#   entrypoint.sh test [options of make]          every test and every notebook
#   entrypoint.sh doctor | shell | any command
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$HOME/work

say() { printf 'memlib: %s\n' "$@" >&2; }

# Under a user that the image does not know, or a read-only root, there must still be some home:
# Jupyter, IPython and matplotlib write there.
if ! [ -w "$HOME" ]; then
    home=$(mktemp -d) || {
        say "Neither $HOME nor /tmp can be written by user $(id -u). Add: --tmpfs /tmp"
        exit 1
    }
    export HOME=$home
fi

# Goes to the work folder with the notebooks in it. What is there belongs to the person: it stays as it is.
open_work() {
    if ! { mkdir -p "$work" && [ -w "$work" ] && [ -x "$work" ]; } 2>/dev/null; then
        say "$work cannot be written by user $(id -u); it belongs to user $(stat -c %u "$work" || echo ?)." \
            "The lab starts in a folder that ENDS WITH THE CONTAINER. To keep your work, stop it and either" \
            "  run as the owner of the folder:      --user \"\$(id -u)\" --group-add users" \
            "  or let the engine keep the folder:   -v memlib:$work"
        work=$(mktemp -d)
    fi
    mkdir -p "$work/notebooks" || true
    local notebook
    for notebook in "$project"/notebooks/*; do
        if ! [ -e "$work/notebooks/${notebook##*/}" ]; then
            cp -R "$notebook" "$work/notebooks/" || say "${notebook##*/} is missing from $work/notebooks"
        fi
    done
    export MEMLIB_WORK=$work MEMLIB_HOME=${MEMLIB_HOME:-$work/.memlib}
    cd "$work"
}

[ $# -gt 0 ] || set -- lab
case $1 in
    lab)
        open_work
        exec python -m jupyterlab --ip=0.0.0.0 --no-browser "${@:2}"
        ;;
    test)
        # CI would ask for a browser, which is not here.
        exec make -C "$project" BIN="$(dirname "$(command -v python)")" ENV= CI= test "${@:2}"
        ;;
    doctor)
        exec memlib doctor "${@:2}"
        ;;
    shell)
        open_work
        exec bash "${@:2}"
        ;;
    *)
        open_work
        exec "$@"
        ;;
esac
