"""Train Phi-4-multimodal with the original's flags: `python src/train_single_config_remote.py --config paper_r64`."""

import sys

from speechtune.legacy.train_pronunciation import main

if __name__ == "__main__":
    sys.exit(main())
