"""Rescue a LoRA out of a full checkpoint: `python tools/fix_lora_saving.py --checkpoint C --output O [--alpha 32]`."""

import argparse
import sys
from pathlib import Path

try:
    from speechtune.commands.guarded import guarded
except ModuleNotFoundError as error:
    print(f"{sys.argv[0]}: {error.name} is missing: run `pip install -e .` in speechtune's folder", file=sys.stderr)
    sys.exit(2)


def main() -> int:
    """Exit code 0 when an adapter was written and verified."""
    parser = argparse.ArgumentParser(description="Extract LoRA adapters from a full checkpoint.")
    parser.add_argument("--checkpoint", "--path", type=Path, required=True, help="checkpoint folder or weights file")
    parser.add_argument("--output", type=Path, required=True, help="new adapter folder")
    parser.add_argument("--alpha", type=float, help="lora_alpha of the training (default: files near the checkpoint)")
    parser.add_argument("--base", help="hub id or folder of the base (default: files near the checkpoint)")
    parser.add_argument("--rslora", action="store_true", default=None, help="the training scaled by sqrt(rank)")
    parser.add_argument("--adapter-name", help="which adapter, where the checkpoint holds several")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = vars(parser.parse_args())

    def run() -> int:
        from speechtune.commands.adapters import run_extract

        return run_extract(options.pop("checkpoint"), options.pop("output"), as_json=options.pop("json"), **options)

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
