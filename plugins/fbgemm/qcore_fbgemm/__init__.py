"""The backend ``fbgemm`` of qcore: torch's FBGEMM kernels."""
