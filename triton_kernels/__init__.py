"""Triton kernels of nexus_fused, installed as nexus_fused.triton_kernels; nexus_fused/triton.py calls their launchers.

Every kernel over weights walks `table.Table.rows` with one program per chunk of CHUNK_ELEMENTS elements, or per part of
one where nothing is summed over it: a large parameter is spread over the chip, a small one is one program. Programs
write only what is theirs, and whatever is summed is summed per chunk and then over chunks in a fixed order, so results
repeat bit for bit. In-place kernels are never autotuned (that would apply them several times), and everything that may
change in a run is a run-time argument.
"""
