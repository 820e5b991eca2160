"""Verify LoRA adapters: `python tools/verify_lora_adapters.py --path P [--find-all] [--verbose] [--base BASE]`."""

import argparse
import sys
from pathlib import Path

try:
    from speechtune.commands.guarded import guarded
except ModuleNotFoundError as error:
    print(f"{sys.argv[0]}: {error.name} is missing: run `pip install -e .` in speechtune's folder", file=sys.stderr)
    sys.exit(2)


def main() -> int:
    """Exit code 0 when all are valid, else 1."""
    parser = argparse.ArgumentParser(description="Verify a saved LoRA adapter.")
    parser.add_argument("--path", type=Path, required=True, help="adapter folder")
    parser.add_argument("--find-all", action="store_true", help="verify every adapter under the path")
    parser.add_argument("--verbose", action="store_true", help="list the tensors too")
    parser.add_argument("--base", help="hub id or folder of the base: load it and prove the adapter's effect")
    parser.add_argument(
        "--speech-lora",
        choices=("merge", "continue", "stack", "drop"),
        help="of an adapter without base_recipe.json: what its base's speech LoRA had become when it was trained",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()

    def run() -> int:
        from speechtune.commands.adapters import run_verify

        flags = {"find_all": options.find_all, "verbose": options.verbose, "as_json": options.json}
        prepared = {"speech_lora": options.speech_lora} if options.speech_lora else None
        return run_verify(options.path, options.base, model_options=prepared, **flags)

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
