"""`python -m sims` is the `displacement` command."""

import sys

from sims.cli import main

sys.exit(main())
