"""Merge an adapter: `python trainer/merger.py --lora_adapter_path A --output_path O [--base_model_path B] ...`."""

import argparse
import sys
from pathlib import Path

try:
    from speechtune.commands.guarded import guarded
except ModuleNotFoundError as error:
    print(f"{sys.argv[0]}: {error.name} is missing: run `pip install -e .` in speechtune's folder", file=sys.stderr)
    sys.exit(2)


def main() -> int:
    """Exit code 0 when the merged model was written and checked."""
    parser = argparse.ArgumentParser(description="Merge a LoRA adapter into its base.")
    parser.add_argument("--base_model_path", help="hub id or folder (default: the base the adapter names)")
    parser.add_argument("--lora_adapter_path", type=Path, required=True, help="adapter or checkpoint folder")
    parser.add_argument("--output_path", type=Path, required=True, help="new folder of the merged model")
    parser.add_argument(
        "--speech-lora",
        choices=("merge", "continue", "stack", "drop"),
        help="of an adapter without base_recipe.json: what its base's speech LoRA had become when it was trained",
    )
    parser.add_argument("--compare_models", action="store_true", help="compare base, adapter and merged on a text")
    parser.add_argument("--test_input", help="the text to compare on")
    parser.add_argument("--no_save_tokenizer", action="store_true", help="leave tokenizer and processor files out")
    options = parser.parse_args()
    if options.test_input is not None and not options.compare_models:
        parser.error("--test_input is the text of --compare_models; give both")

    def run() -> int:
        from speechtune.commands.adapters import TEST_INPUT, run_merge

        return run_merge(
            options.lora_adapter_path,
            options.output_path,
            base=options.base_model_path,
            model_options={"speech_lora": options.speech_lora} if options.speech_lora else None,
            save_tokenizer=not options.no_save_tokenizer,
            compare_models=options.compare_models,
            test_input=options.test_input or TEST_INPUT,
        )

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
