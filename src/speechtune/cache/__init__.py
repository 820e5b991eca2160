"""The cache of encoded clips: a content-addressed store of features on disk, and the sets read from it."""
