#include "product_avx2.h"
// The product comes first: what follows is written for it.
#include "table.h"

namespace quad {

const Kernels* avxvnni_kernels() {
    static const Kernels kernels = table("avxvnni");
    return &kernels;
}

}  // namespace quad
