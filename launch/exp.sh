#!/bin/sh
# launch/exp.sh train|eval FOLDER PARTITION N [...]: what the train.sh and eval.sh of every experiment call.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
# Our packages come first on the path, and nothing is imported from the folder in which the user happens to be.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
if [ "$#" -lt 4 ] && [ "${3-}" != -h ] && [ "${3-}" != --help ]; then
    echo "usage: $1.sh PARTITION N [--set KEY=VALUE ...]   e.g. $1.sh local 2 (two processes), $1.sh local 0 (one, no GPU)" >&2
    exit 2
fi
# Python 3.10 does not know PYTHONSAFEPATH: `-m` would import a package `utils` of the folder in which the user is.
exec "$python" -c 'import sys; sys.path[:] = filter(None, sys.path); import runpy; from utils import errors
sys.exit(errors.run_cli(lambda: runpy.run_module("launch", run_name="__main__", alter_sys=True) and 0))' "$@"
