"""The backend ``qnnpack`` of qcore: torch's QNNPACK kernels."""
