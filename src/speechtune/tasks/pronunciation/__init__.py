"""Pronunciation assessment: phones, targets, answers and metrics."""
