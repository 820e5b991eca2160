"""Static checks of training scripts for issues around LoRA, labels and saving."""
