"""Phi-4-multimodal: pronunciation assessment."""

MODEL_TYPES = ("phi4_multimodal", "phi4mm")
"""Of native folders, and of remote-code folders, which are refused with the way out."""
