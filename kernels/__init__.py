"""Triton kernels, one op a file, installed as ``fastscnn_fast.kernels``. Version 0.1.0 has none yet."""
