"""Find (--fix: correct) issues of LoRA training scripts: `python fix_lora_training.py SCRIPT [--fix] [--json]`."""

import sys

from speechtune.cli import main

if __name__ == "__main__":
    sys.exit(main(["lint", *sys.argv[1:]]))
