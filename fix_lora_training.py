"""Find, and with --fix mend, faults of LoRA training scripts: `python fix_lora_training.py SCRIPT [--fix] [--json]`."""

import argparse
import sys
from pathlib import Path

from speechtune.commands.guarded import guarded


def main() -> int:
    """Read the flags and run `speechtune.lint.lint`; 0 clean, 1 faults left, 2 bad input."""
    parser = argparse.ArgumentParser(description="Find faults of LoRA training scripts without running them.")
    parser.add_argument("scripts", type=Path, nargs="+", metavar="SCRIPT", help="Python file, or folder of them")
    parser.add_argument("--fix", action="store_true", help="mend what is certain; the original is kept as SCRIPT.bak")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()

    def run() -> int:
        from speechtune.commands.lint import run_lint

        return run_lint(options.scripts, options.fix, options.json)

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
