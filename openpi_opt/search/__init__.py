"""Proposing configurations, running each in a process of its own, keeping what they gave."""
