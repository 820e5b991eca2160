"""Find (--fix: correct) issues of LoRA training scripts: `python fix_lora_training.py SCRIPT [--fix] [--json]`.

Without a script it corrects src/model_utility_configs.py, as the original pipeline's did.
"""

import sys

ORIGINAL = "src/model_utility_configs.py"

if __name__ == "__main__":
    try:
        from speechtune.cli import main
    except ModuleNotFoundError as error:
        print(f"{sys.argv[0]}: {error.name} is missing: pip install 'speechtune[lint]'", file=sys.stderr)
        sys.exit(2)
    given = sys.argv[1:]
    named = any(not argument.startswith("-") or argument in {"-h", "--help"} for argument in given)
    sys.exit(main(["lint", *given] if named else ["lint", ORIGINAL, *({*given} - {"--fix"}), "--fix"]))
