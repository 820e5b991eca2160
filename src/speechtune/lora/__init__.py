"""LoRA on a model, and adapter files."""
