#include "product_avx2.h"
// The product comes first: what follows is written for it.
#include "table.h"

namespace quad {

const Kernels* avx2_kernels() {
    static const Kernels kernels = table("avx2");
    return &kernels;
}

}  // namespace quad
