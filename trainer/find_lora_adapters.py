"""Find LoRA adapters by content: `python trainer/find_lora_adapters.py --path . [--verbose]`."""

import argparse
import sys
from pathlib import Path

try:
    from speechtune.commands.guarded import guarded
except ModuleNotFoundError as error:
    print(f"{sys.argv[0]}: {error.name} is missing: run `pip install -e .` in speechtune's folder", file=sys.stderr)
    sys.exit(2)


def main() -> int:
    """Exit code 0 when one was found, else 1."""
    parser = argparse.ArgumentParser(description="Find LoRA adapters, whatever their folders are called.")
    parser.add_argument("--path", type=Path, default=Path("."), help="where to look (default: here)")
    parser.add_argument("--verbose", action="store_true", help="show what was checked of each")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()

    def run() -> int:
        from speechtune.commands.adapters import run_find

        return run_find(options.path, verbose=options.verbose, as_json=options.json)

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
