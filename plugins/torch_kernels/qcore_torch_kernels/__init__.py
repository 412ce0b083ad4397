"""What backends on torch's native quantized operators have in common: kernels, packing, and replay."""
