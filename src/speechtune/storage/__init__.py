"""Files and folders that are complete or not there: written aside, read back, hashed, then renamed."""
