"""Native CPU kernels: C++ in `src`, one object per instruction set, as operators of PyTorch's stable ABI.

`library` loads them and says which instruction set runs, `lines` is the layout of the weights that they read.
"""
