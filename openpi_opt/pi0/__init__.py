"""The Pi0 policy in plain PyTorch: model, inputs, weights and checkpoints."""
