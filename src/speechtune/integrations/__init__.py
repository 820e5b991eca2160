"""speechtune inside other trainers."""
