"""Phi-4-multimodal: pronunciation assessment."""
