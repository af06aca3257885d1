// All kernels of an instruction set, for the file that is compiled for it.
#pragma once

#include "decode.h"
#include "head.h"
#include "prompt.h"
#include "rounding.h"

namespace {

quad::Kernels table(const char* name) {
    return {name,          linear, quantize,      hadamard_rows,   head, norm, rotate, gated, add, attend,
            attend_prompt, decode, round_columns, descend_columns, rounding_errors};
}

}  // namespace
