#!/bin/sh
exec "$(dirname -- "$(readlink -f -- "$0")")"/../../../../launch/exp.sh train "$(dirname -- "$(readlink -f -- "$0")")" "$@"
