"""Kernels without a GPU: machine code, caches that travel, configurations."""
