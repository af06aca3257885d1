#include "product_avx512.h"
// The product comes first: what follows is written for it.
#include "table.h"

namespace quad {

const Kernels* avx512vnni_kernels() {
    static const Kernels kernels = table("avx512vnni");
    return &kernels;
}

}  // namespace quad
