"""A family from outside the package, for tests: text in, a row of loudness levels out, heard as a tone."""

MODEL_TYPES = ("llama",)
