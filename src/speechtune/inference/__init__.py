"""A trained model in use: load, generate, score, evaluate."""
