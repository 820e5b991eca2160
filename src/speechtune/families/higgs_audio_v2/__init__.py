"""Higgs Audio v2: zero-shot voice cloning."""

MODEL_TYPES = ("higgs_audio_v2", "higgs_audio")
"""Of native folders, and of the original package's."""
