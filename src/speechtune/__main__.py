"""`python -m speechtune` is the command line."""

import sys

from speechtune.cli import main

sys.exit(main())
