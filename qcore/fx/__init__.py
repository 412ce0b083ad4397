"""The passes from a float module to a quantized one, one module each: trace, fuse, plan, observe, convert."""
