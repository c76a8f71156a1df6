"""``python -m durometer``."""

import sys

from durometer.cli import main

if __name__ == "__main__":
    sys.exit(main())
