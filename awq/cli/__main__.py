"""`python -m awq.cli`, the older spelling of `python -m awq`."""

import sys

from awq.cli import main

if __name__ == "__main__":
    sys.exit(main())
