#!/usr/bin/env bash
# A visit of 4 minutes to a GPU: every configuration of every kernel, and the candidate for Hopper. What is launched by
# default is chosen from these numbers; run it after a change to a kernel, before gpu_check.sh.
#
# OUT      folder for results (default ./gpu-results)
# PYTHON   interpreter (default python3)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=${PYTHON:-python3}
out=$(mkdir -p "${OUT:-gpu-results}" && cd "${OUT:-gpu-results}" && pwd)
export PYTHONPATH=kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=0

# sweep NAME SECONDS MODULE ARGUMENTS...: runs it with a time limit; what it prints last is printed.
sweep() {
    local name=$1 limit=$2 status
    shift 2
    timeout --kill-after=5 "$limit" "$python" -m "$@" --output "$out/$name.jsonl" >"$out/$name.log" 2>&1
    status=$?
    ((status)) && failed=1
    echo "== $name: status $status"
    tail -n 40 "$out/$name.log"
}

sweep few-tokens 50 benchmarks.sweep_few --tokens 1 8 --compile-seconds 20 --seconds 22
sweep few-tokens-early 40 benchmarks.sweep_few --tokens 1 --shapes 28672x4096 6144x4096 4160x14336 --quantize --early \
    --compile-seconds 15 --seconds 15
sweep hadamard 45 benchmarks.sweep_hadamard --sizes 14336 4096 --compile-seconds 20 --seconds 16
sweep hopper 55 benchmarks.hopper_prototype
sweep tiles 60 benchmarks.sweep --shapes 28672x4096 4160x14336 --tokens 2048 16 --compile-seconds 25 --seconds 25
exit "$failed"
