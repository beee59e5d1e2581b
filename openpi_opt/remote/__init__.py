"""Trials on other hosts, by Ray or Slurm."""
