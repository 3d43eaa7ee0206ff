#!/usr/bin/env bash
# Run make under Python 3.13 on a Debian or Ubuntu machine that has only an older Python:
#   newest.sh [arguments of make]     in a Debian 13 root, on a clone of the current commit
# Needs root, git and mmdebstrap (which this installs), and 3 GB in build/newest; with TORCH=cuda 8 GB.
# The root and its .venv are kept for the next call.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD/build/newest
clone=$root/root/memlib

if ! command -v mmdebstrap >/dev/null; then
    apt-get -q update >/dev/null
    apt-get -qy install --no-install-recommends mmdebstrap >/dev/null
fi
if [ ! -x "$root/usr/bin/python3" ]; then
    mkdir -p build
    # Triton's interpreter and its compiler need gcc and the headers.
    mmdebstrap --quiet --variant=apt --include=python3-venv,python3-dev,git,make,gcc,libc6-dev trixie "$root"
fi

# The network's and pip's settings are this machine's.
for file in /etc/resolv.conf /etc/hosts /etc/pip.conf "$HOME/.config/pip/pip.conf"; do
    [ ! -e "$file" ] || install -D -m 644 "$file" "$root${file/#$HOME//root}"
done
rm -rf "$root/etc/ssl/certs" && mkdir -p "$root/etc/ssl"
cp -rL /etc/ssl/certs "$root/etc/ssl/certs"

[ -d "$clone/.git" ] || git init -q "$clone"
git -C "$clone" fetch -q "$PWD" HEAD
git -C "$clone" reset -q --hard FETCH_HEAD

# What is mounted here ends with the command.
exec env -u VIRTUAL_ENV HOME=/root root="$root" unshare --mount bash -c '
    mount -t proc proc "$root/proc"
    mount --rbind /dev "$root/dev"
    exec chroot "$root" make -C /root/memlib "$@"' newest "$@"
