#!/usr/bin/env bash
# A visit of 4 minutes to a GPU: every configuration of every kernel, and the candidate for Hopper. What is launched by
# default is chosen from these numbers; run it after a change to a kernel, before gpu_check.sh.
#
# OUT      folder for results (default ./gpu-results)
# WHEELS   folder of wheels to install first into a temporary folder
# PYTHON   interpreter (default python3)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

source kernels/benchmarks/phases.sh
begin sweeps.log 300

# sweep NAME SECONDS MODULE ARGUMENTS...: one phase, with a file of rows.
sweep() {
    phase "$1" "$2" "$python" -m "${@:3}" --output "$out/$1.jsonl"
}

sweep few-tokens 50 benchmarks.sweep_few --tokens 1 8 --compile-seconds 20 --seconds 22
sweep few-tokens-early 40 benchmarks.sweep_few --tokens 1 --shapes 28672x4096 6144x4096 4160x14336 --quantize --early \
    --compile-seconds 15 --seconds 15
sweep hadamard 45 benchmarks.sweep_hadamard --sizes 14336 4096 --compile-seconds 20 --seconds 16
sweep hopper 55 benchmarks.hopper_prototype
sweep tiles 60 benchmarks.sweep --shapes 28672x4096 4160x14336 --tokens 2048 16 --compile-seconds 25 --seconds 25
tail -n 150 "$log"
summary
