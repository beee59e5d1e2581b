"""Fast paths that knobs put into the policy, each beside its plain PyTorch reference."""
