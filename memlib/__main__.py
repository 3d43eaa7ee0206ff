"""Run the command line by `python -m memlib`, as launchers such as torchrun do."""

import sys

from memlib.cli import main

if __name__ == "__main__":
    sys.exit(main())
