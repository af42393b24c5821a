"""Measures this machine: disks, kernels, and conversions in memory of a given size beside `cp` and other tools."""
