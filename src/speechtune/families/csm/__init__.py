"""Sesame CSM: speech from text, in the voice of earlier turns."""

MODEL_TYPES = ("csm",)
