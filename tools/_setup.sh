# Sourced by the scripts beside it. Gives $root (the repository), $venv and the functions set_up and set_up_browser.
# shellcheck shell=bash

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv-test

heading() { printf '\n== %s ==\n' "$*"; }

# What the environment was made from: when one of these differs, pip runs again. The path, because a venv cannot move.
_stamp() {
    "${PYTHON:-python3}" --version
    printf '%s\n' "$root"
    cat -- "$root/constraints.txt" "$root/pyproject.toml" "$root/tools/_setup.sh"
}

_install() {
    local python=$venv/bin/python
    if ! [ -x "$python" ] || [ "$("$python" --version)" != "$("${PYTHON:-python3}" --version)" ]; then
        rm -rf -- "$venv"
        "${PYTHON:-python3}" -m venv "$venv" || return
    fi
    local pip=("$python" -m pip --disable-pip-version-check install -qq --progress-bar off
        --constraint "$root/constraints.txt")
    # torch first and by its exact version: where pip knows of a local CPU build of it, that one is taken, and what
    # comes after is content with it. A bare `torch` would fetch gigabytes of CUDA.
    "${pip[@]}" "$(grep -E '^torch==' "$root/constraints.txt")" || return
    "${pip[@]}" --editable "$root[qwen,serve,ray,remote,dev]" || return
}

# Makes or renews the environment; does nothing when it is as it should be.
set_up() {
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "Python 3.10 or later is needed; ${PYTHON:-python3} is not (set PYTHON)" >&2
        return 1
    }
    # Under a lock, because two runs in one checkout would install into each other.
    (
        flock 9
        stamp=$(_stamp | sha256sum)
        if [ "$(cat -- "$venv/stamp" 2>/dev/null)" = "$stamp" ]; then
            echo "$venv is up to date"
        else
            echo "installing into $venv"
            rm -f -- "$venv/stamp"
            _install && printf '%s\n' "$stamp" >"$venv/stamp"
        fi
    ) 9>"$root/.venv-test.lock"
}

# CNCF's registry for a test of push and pull, where it can be had without asking. That test is skipped without one.
set_up_registry() {
    if command -v docker-registry registry >/dev/null; then
        echo "a registry is there"
        return
    fi
    if [ "$(id -u)" -ne 0 ] || ! [ -e /etc/debian_version ] || ! command -v apt-get >/dev/null; then
        echo "no registry, and only root on Debian can install it here: its test will be skipped"
        return
    fi
    echo "installing docker-registry"
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends docker-registry; } \
        >/dev/null 2>&1 || echo "apt-get could not install docker-registry: its test will be skipped"
}

# A browser for the test of `inspect --html`, where it can be had without asking. That test is skipped without one.
set_up_browser() {
    local name
    for name in chromium chromium-browser google-chrome; do
        if command -v "$name" >/dev/null; then
            echo "$name is there"
            return
        fi
    done
    if [ "$(id -u)" -ne 0 ] || ! [ -e /etc/debian_version ] || ! command -v apt-get >/dev/null; then
        echo "no chromium, and only root on Debian can install it here: its test will be skipped"
        return
    fi
    echo "installing chromium"
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium; } \
        >/dev/null 2>&1 || echo "apt-get could not install chromium: its test will be skipped"
}
