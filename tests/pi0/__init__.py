"""Tests of the policy, and the mutations other tests reuse."""
