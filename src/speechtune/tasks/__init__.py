"""What is measured, independent of any model: pronunciation assessment and voice cloning."""
