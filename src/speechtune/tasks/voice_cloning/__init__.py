"""Voice cloning: word errors, speaker similarity, predicted MOS, and comparisons of systems."""
