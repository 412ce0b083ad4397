"""The backend ``x86_onednn`` of qcore: oneDNN kernels on plain integer tensors."""
