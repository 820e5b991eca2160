"""Train Higgs Audio v2 with the original pipeline's flags: `python trainer/train_v2.py --model_path ... --use_lora`."""

import sys

from speechtune.legacy.train_v2 import main

if __name__ == "__main__":
    sys.exit(main())
