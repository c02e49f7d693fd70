"""The Triton kernels in Triton's interpreter."""

from triton_parity import *  # noqa: F403
