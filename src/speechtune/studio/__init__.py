"""A page in a browser on what the command line does: a file for each tab, which lays out and calls what lies beside."""
