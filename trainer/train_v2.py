"""Train Higgs Audio v2 with the original pipeline's flags: `python trainer/train_v2.py --model_path ... --use_lora`."""

import sys

try:
    from speechtune.legacy.train_v2 import main
except ModuleNotFoundError as error:
    print(f"{sys.argv[0]}: {error.name} is missing: run `pip install -e .` in speechtune's folder", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main())
