"""The report of a run: read its files, and write one HTML page and one Markdown file."""
