"""Every clip encoded once: a content-addressed store of features on disk, and the sets read from it."""
