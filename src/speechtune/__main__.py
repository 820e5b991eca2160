"""`python -m speechtune` is the command line."""

from __future__ import annotations

import sys

from speechtune.cli import main

sys.exit(main())
