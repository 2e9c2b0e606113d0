#!/bin/sh
exec "$(dirname -- "$(readlink -f -- "$0")")"/../../../../launch/exp.sh eval "$(dirname -- "$(readlink -f -- "$0")")" "$@"
