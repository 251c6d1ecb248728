"""`python -m awq.cli`."""

import sys

from awq.cli import main

sys.exit(main())
