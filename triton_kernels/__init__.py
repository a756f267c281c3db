"""The Triton kernels and their launchers, one stage a file; installed as hedgespec.triton_kernels."""
