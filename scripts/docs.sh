#!/usr/bin/env bash
# Build the documentation site into site/, from nothing: own environment. A broken link is an error.
#
#   bash scripts/docs.sh [serve]
#
# Needs Python 3.11 or newer and pip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-docs

# shellcheck source=scripts/environment.sh
source scripts/environment.sh
make_environment "$venv" docs --editable '.[docs]'

exec "$venv/bin/python" -m mkdocs "${1:-build}" --strict
