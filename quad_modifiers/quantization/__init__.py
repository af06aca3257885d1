"""Weight quantization: integer grids and GPTQ around full-precision columns; imports torch, `nn` and `linalg` only."""
