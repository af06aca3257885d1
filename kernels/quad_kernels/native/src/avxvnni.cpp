#include "product_avx2.h"
// The product comes first: what follows is written for it.
#include "head.h"

namespace quad {

const Kernels* avxvnni_kernels() {
    static const Kernels kernels{"avxvnni", linear, quantize, hadamard_rows, head};
    return &kernels;
}

}  // namespace quad
