#define QUAD_AMX
#include "product_avx512.h"
// The product comes first: what follows is written for it.
#include "decode.h"
#include "head.h"
#include "prompt.h"
#include "rounding.h"

namespace quad {

const Kernels* amx_kernels() {
    static const Kernels kernels{"amx",  linear, quantize,      hadamard_rows, head,          norm,           rotate,
                                 gated,   add,    attend,        attend_prompt, decode,        round_columns,
                                 descend_columns, rounding_errors};
    return &kernels;
}

}  // namespace quad
