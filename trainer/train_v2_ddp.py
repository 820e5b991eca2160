"""The same on several GPUs: `torchrun --nproc_per_node=N trainer/train_v2_ddp.py --model_path ... --use_lora`."""

import sys

from speechtune.legacy.train_v2 import main

if __name__ == "__main__":
    sys.exit(main())
