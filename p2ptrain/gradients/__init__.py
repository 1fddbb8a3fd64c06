"""Sums of gradients: accumulating them, encoding them, averaging them. Torch, no I/O.

Tensors are flat float32 on the CPU and bytes are little-endian, as on every machine torch runs on.
"""
