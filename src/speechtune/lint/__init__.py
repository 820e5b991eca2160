"""Static checks of other people's training scripts for faults around LoRA, labels and saving."""
