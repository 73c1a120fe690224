"""Triton kernels of nexus_fused, installed as nexus_fused.triton_kernels."""
