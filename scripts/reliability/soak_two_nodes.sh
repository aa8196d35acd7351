#!/usr/bin/env bash
# Makes two nodes on this machine, and disconnects and reconnects one of them; needs root. See soak_two_nodes.py.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/reliability/soak_two_nodes.sh [--cuts N] [--steps N] [--timeout SECONDS] [--seed N] [--out FILE]

Makes two network namespaces with the addresses 10.86.0.1 and 10.86.0.2, connected by a bridge in a third one, starts an
agent (torchrun) with one rank in each, disconnects the second node many times, and compares the losses with those of an
undisturbed run. Prints one JSON object; exit status 1 if anything was lost or the job failed.

Needs root, `ip` (Debian: apt-get install iproute2) and a kernel that permits network namespaces; if one is missing, the
script prints one line and ends with status 77. $PYTHON names the Python to use (default: .venv's, or python3).
TEXT
}

refuse() {
    echo "soak_two_nodes: skipped: $1" >&2
    exit 77
}

for arg in "$@"; do
    if [[ $arg == --help || $arg == -h ]]; then usage; exit; fi
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || python=python3

[[ $(id -u) == 0 ]] || refuse "network namespaces need root"
command -v ip >/dev/null || refuse "there is no \`ip\` here: apt-get install iproute2"

one=hllm-$$-1 two=hllm-$$-2 switch=hllm-$$-switch
remove() {
    for space in "$one" "$two" "$switch"; do
        ip netns delete "$space" 2>/dev/null || true
    done
}
trap remove EXIT

connect() { # namespace, address, port of the switch
    ip link add eth0 netns "$1" type veth peer name "$3" netns "$switch" &&
        ip -n "$1" address add "$2/24" dev eth0 && ip -n "$1" link set lo up && ip -n "$1" link set eth0 up &&
        ip -n "$switch" link set "$3" master bridge up
}

build() {
    ip netns add "$switch" && ip netns add "$one" && ip netns add "$two" &&
        ip -n "$switch" link add bridge type bridge && ip -n "$switch" link set bridge up &&
        connect "$one" 10.86.0.1 port1 && connect "$two" 10.86.0.2 port2
}

said=$(build 2>&1) || refuse "network namespaces are refused here: ${said//$'\n'/; }"
"$python" "$root/scripts/reliability/soak_two_nodes.py" --spaces "$one" "$two" "$switch" "$@"
