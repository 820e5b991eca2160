"""The original pipelines' command lines, translated into recipes."""
