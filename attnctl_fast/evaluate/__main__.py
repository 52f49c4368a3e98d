"""Run a sweep: `python -m attnctl_fast.evaluate`."""

import sys

from .main import main

sys.exit(main())
