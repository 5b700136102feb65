# Sourced by the other scripts: one .venv in the checkout, made once and reused.
# Usage: . tools/venv.sh; use_venv requirements.txt [more.txt ...]     sets PY to the venv's python.

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    echo "no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python3 $0" >&2
    return 1
}

use_venv() {
    local python stamp wanted
    if [ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ]; then
        python=$(find_python) || return 1
        # Another interpreter than the one asked for: make the environment anew.
        if [ -x .venv/bin/python ] && [ "$(.venv/bin/python -c 'import sys; print(sys.version_info[:2])')" \
            != "$("$python" -c 'import sys; print(sys.version_info[:2])')" ]; then
            rm -rf .venv
        fi
        [ -x .venv/bin/python ] || { echo "making .venv with $python"; "$python" -m venv .venv || return 1; }
    fi
    PY=$PWD/.venv/bin/python
    # One stamp per set of files: an unchanged set is not installed again.
    wanted=$(cat "$@" | cksum | tr ' ' '-')
    stamp=.venv/installed-$(echo "$@" | tr ' /' '__')
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing $* (about a minute)"
        "$PY" -m pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' "$@") || return 1
        echo "$wanted" > "$stamp"
    fi
}
