"""Run the command line: `python -m attnctl_fast`."""

import sys

from .cli import main

sys.exit(main())
