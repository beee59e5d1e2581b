"""Measuring: the clock and its statistics, memory, kernels, and the guard on the actions."""
