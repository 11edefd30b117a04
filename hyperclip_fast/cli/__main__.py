"""`python -m hyperclip_fast.cli` is `hyperclip`."""

import sys

from hyperclip_fast.cli.main import main

sys.exit(main())
