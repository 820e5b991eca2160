"""Train Phi-4-multimodal with the original's flags: `python src/train_single_config_remote.py --config paper_r64`."""

import sys

try:
    from speechtune.legacy.train_pronunciation import main
except ModuleNotFoundError as error:
    print(f"{sys.argv[0]}: {error.name} is missing: run `pip install -e .` in speechtune's folder", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main())
