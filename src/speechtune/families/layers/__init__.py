"""The fast decoder layers that the families share."""
