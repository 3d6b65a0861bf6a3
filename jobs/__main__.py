"""`python -m jobs NAME ...` is `swath NAME ...`."""

import sys

from jobs.cli import main

sys.exit(main())
