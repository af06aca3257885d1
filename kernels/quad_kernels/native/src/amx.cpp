#define QUAD_AMX
#include "product_avx512.h"
// The product comes first: what follows is written for it.
#include "table.h"

namespace quad {

const Kernels* amx_kernels() {
    static const Kernels kernels = table("amx");
    return &kernels;
}

}  // namespace quad
