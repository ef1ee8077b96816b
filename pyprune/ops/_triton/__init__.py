"""Triton kernels, for GPUs without pyprune's compiled ones; importing one of the modules here imports triton."""
