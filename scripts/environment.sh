# shellcheck shell=bash
# A virtual environment of its own for a script, made from nothing. Sourced, not run.
#
#   make_environment FOLDER SOURCES PIP_ARGUMENTS [-- PIP_ARGUMENTS]...
#
# SOURCES is any text that names what the environment is made of. The environment is reused while
# that text and pyproject.toml stay the same. Needs Python 3.11 or newer and pip; set PYTHON to
# choose one.

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate candidates=${PYTHON:-python3 python3.13 python3.12 python3.11}
    for candidate in $candidates; do
        if new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    echo "error: Python: none of '$candidates' is 3.11 or newer. Set PYTHON to one that is." >&2
    return 1
}

make_environment() {
    local venv=$1 mark python arguments=()
    # Written last, so an environment without the right mark was interrupted or is of other sources.
    mark="$(cksum <pyproject.toml) $2"
    shift 2
    if [[ "$(cat "$venv/complete" 2>/dev/null)" == "$mark" ]] && new_enough "$venv/bin/python"; then
        return
    fi
    python="$(find_python)"
    echo "making the environment $venv with $("$python" --version) (once; a few minutes)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
    for argument in "$@" --; do
        if [[ $argument != -- ]]; then
            arguments+=("$argument")
        else
            "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${arguments[@]}"
            arguments=()
        fi
    done
    echo "$mark" >"$venv/complete"
}
