"""A model behind an HTTP interface: batches, voices, audio formats, limits. `speechtune serve` starts it."""
