#!/usr/bin/env bash
# A visit to a GPU for whole models, in under 9 minutes: compression on the card, then a decode step and a prompt.
#
#   kernels/benchmarks/gpu_model.sh          on a machine with a CUDA device, torch, triton and transformers
#   kernels/benchmarks/gpu_model.sh --dry    the same on toys, on the CPU
#
# OUT      folder for results (default ./gpu-results)
# WHEELS   folder of wheels to install first into a temporary folder: llmcompressor, compressed-tensors, pydantic and
#          what else is missing
# CHECKPOINT  folder of a model to compress on the card and on the CPU, whose results are compared (left out by default)
# COMMIT   recorded with the results where there is no git
# PYTHON   interpreter (default python3)
#
# Small comes before large, so that a fault shows within a minute; a later phase runs even if an earlier one failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

source kernels/benchmarks/phases.sh
export PYTHONPATH=$PWD:$PWD/$PYTHONPATH HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
begin models.log 530
model=("$python" -m benchmarks.whole_model --output "$out/models.jsonl" ${COMMIT:+--commit "$COMMIT"})
if [[ ${1:-} == --dry ]]; then
    phase "a toy" 120 "${model[@]}" --model toy --samples 4 --length 64 --prompt 64 --context 16 --repeats 3 --device cpu
else
    phase "two small layers" 90 "${model[@]}" --model llama-3.2-1b --layers 2 --samples 8 --length 256 --prompt 512
    phase "two layers of 8B" 110 "${model[@]}" --layers 2 --profile 24
    phase "the same in few launches" 80 env QUAD_KERNELS_BLOCKS=1 "${model[@]}" --layers 2 --profile 24
    phase "8B, 64 x 512" 300 env QUAD_KERNELS_BLOCKS=1 "${model[@]}"
fi
if [[ -n ${CHECKPOINT:-} ]]; then
    for device in cuda cpu; do
        phase "a checkpoint on $device" 120 "$python" -m quad_modifiers compress "$CHECKPOINT" quad_w4a4 \
            -o "$out/compressed-$device" --samples 16 --device "$device"
    done
fi

summary | tee "$out/models.txt"
