#!/usr/bin/env bash
# One visit to a GPU: correctness, benchmark, tuning, benchmark again, all tests, in under 9 minutes.
#
#   kernels/benchmarks/gpu_check.sh          on a machine with a CUDA device, torch and triton; nothing is built
#   kernels/benchmarks/gpu_check.sh --dry    every phase on toy shapes on the CPU, in Triton's interpreter
#
# OUT      folder for results (default ./gpu-results)
# WHEELS   folder of wheels to install first into a temporary folder, such as pytest or humming-kernels
# MODELS   models to measure (default llama-3-8b), separated by blanks
# COMMIT   recorded with the results where there is no git
# PYTHON   interpreter (default python3)
#
# Phases come in the order of their value. Each has its own time limit, and a later one runs even if an earlier one
# failed. A short table is printed last.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

dry=0
[[ ${1:-} == --dry ]] && dry=1
source kernels/benchmarks/phases.sh
export QUAD_KERNELS_CACHE=${QUAD_KERNELS_CACHE:-$out/tuned}

module=("$python" -m)
if ((dry)); then
    export TRITON_INTERPRET=1 QUAD_KERNELS=triton
    module=("$python" -m benchmarks.dry)
    # More tokens than the kernel for few takes, whose many small programs take seconds in the interpreter.
    models=(toy) few=(9) prefill=(17) more=(12) all_models=(toy) odd=(11)
    common=(--device cpu --dtype float16 --repeats 2 --row-seconds 1 --ceiling-size 64)
    linears=(qkv down) select=(--cases qkv mlp)
    tune=(--device cpu:0 --dtype float16 --jobs 1)
    tests=(--setup-plan -m "" tests/test_kernels --ignore=tests/test_kernels/test_benchmarks.py) # their fixtures alone
    peers=()
else
    read -ra models <<<"${MODELS:-llama-3-8b}"
    few=(1 16 128) prefill=(2048 8192) more=(2 4 8 32 64 256 512 1024 4096)
    all_models=(llama-3-8b llama-3.2-1b qwen2.5-7b qwen2.5-0.5b) odd=(1 63 1000)
    common=(--device cuda --repeats 15 --row-seconds 2)
    linears=(qkv o gate_up down) select=()
    tune=(--device cuda:0)
    tests=(-m gpu tests/test_kernels --ignore=tests/test_kernels/test_benchmarks.py)
    peers=(--peers --peer-seconds 60)
fi

bench=("${module[@]}" benchmarks.run "${common[@]}" ${COMMIT:+--commit "$COMMIT"})

begin log.txt 530
if "$python" -c 'import pytest' 2>/dev/null; then
    # The fixtures above this folder need the whole project, so only those in it are loaded; the dry run finds a test
    # that asks for another one. A warning of another torch or triton is no failure of a kernel.
    tests=("$python" -m pytest -q -p no:cacheprovider --confcutdir=tests/test_kernels -o filterwarnings=default
        "${tests[@]}")
else
    echo "pytest is not installed: instead of the tests, every shape is compared with the reference" | tee -a "$out/log.txt"
    tests=("${bench[@]}" --gate-only --models "${all_models[@]}" --tokens "${odd[@]}")
fi

phase "environment" 60 "$python" -c 'import platform, torch, triton
print(platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")'

# The peer compiles on the processor while the GPU is used for correctness.
if ((!dry)) && "$python" -c 'import humming' 2>/dev/null; then
    timeout --kill-after=5 150 "$python" -m benchmarks.humming_peer --models "${models[@]}" \
        --tokens "${few[@]}" "${prefill[@]}" >"$out/humming.txt" 2>&1 &
fi

# One process for each linear: compiling takes most of the time. What is compiled here is not compiled below.
phase "correctness of the main shapes" 110 xargs -P 8 -n 1 -a <(printf '%s\n' "${linears[@]}") \
    "${bench[@]}" --gate-only --models "${models[@]}" --tokens "${few[@]}" "${prefill[@]}" --cases
phase "benchmark, untuned" 100 "${bench[@]}" ${select[@]+"${select[@]}"} --models "${models[@]}" --tokens "${prefill[@]}" "${few[@]}" \
    --seconds 85 --output "$out/untuned.jsonl"
phase "tuning" 120 "${module[@]}" benchmarks.tune "${tune[@]}" --models "${models[@]}" \
    --tokens "${prefill[@]}" "${few[@]}" --compile-seconds 60 --seconds 45 --copy-to "$out"
phase "benchmark, tuned" 130 "${bench[@]}" ${select[@]+"${select[@]}"} --models "${models[@]}" --tokens "${prefill[@]}" "${few[@]}" \
    ${peers[@]+"${peers[@]}"} --seconds 115 --output "$out/tuned.jsonl"
phase "tests" 100 "${tests[@]}"
phase "other sizes" 120 "${bench[@]}" ${select[@]+"${select[@]}"} --models "${models[@]}" --tokens "${more[@]}" \
    --seconds 105 --output "$out/tuned.jsonl"
wait

{
    for name in untuned tuned; do
        if [[ -s $out/$name.jsonl ]]; then
            echo "-- $name"
            "$python" -m benchmarks.report "$out/$name.jsonl"
        fi
    done
    summary
} | tee "$out/report.txt"
