"""`python -m awq`: the command `awq`, for `torchrun` and where scripts are not on the path."""

import sys

from awq.cli import main

if __name__ == "__main__":
    sys.exit(main())
