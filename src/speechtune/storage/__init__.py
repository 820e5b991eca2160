"""Folders that are proven whole: written aside, read back, hashed, then published."""
