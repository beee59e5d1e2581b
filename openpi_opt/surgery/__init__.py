"""Replacements for parts of the policy that compute the same function with less work.

Each function takes a policy and changes it in place. A module that is to compute differently gets
another class (a subclass of its own, as `torch.nn.utils.parametrize` and FSDP2 do it), so the
parameters stay where they are and keep their names. All is exact in real arithmetic; the rounding
moves.
"""
