"""The passes from a float module to a quantized one, one module each, in the order: trace, fuse, plan, observe, convert."""
