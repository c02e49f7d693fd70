"""Triton kernels, one op a file, installed as ``fastscnn_fast.kernels``; imported where a backend needs them."""
