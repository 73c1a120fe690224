"""Triton kernels of nexus_fused, installed as nexus_fused.triton_kernels; nexus_fused/triton.py calls their launchers.

Every kernel over weights walks `table.Table.rows` with one program for each chunk of CHUNK_ELEMENTS elements, or for
each part of a chunk if nothing is summed over it. A large parameter is spread over the chip; a small one is one
program. Programs write only what is theirs. Sums are taken over each chunk and then over chunks in a fixed order, so
results repeat bit for bit. In-place kernels are never autotuned, which would apply them several times. Whatever may
change during a run is a run-time argument.
"""
