"""Training: from a configuration to verified checkpoints."""
