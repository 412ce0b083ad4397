"""The backend ``x86_onednn`` of qcore: int8 kernels of oneDNN and, where they are faster, FBGEMM."""
