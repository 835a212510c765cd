"""`python -m echo_hf.cli`, which is `echo-hf`; `torchrun` starts training by it."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
