"""``make bench``: every benchmark, each in a process of its own; results land in ``results/``."""

import subprocess
import sys
from pathlib import Path

NAMES = ("training", "generation", "attention", "directions", "gcg", "restore", "demo")


def main() -> int:
    """Run the benchmarks named on the command line, or all of them."""
    here = Path(__file__).resolve().parent
    codes = []
    for name in sys.argv[1:] or NAMES:
        print(f"== {name}", flush=True)
        codes.append(
            subprocess.run([sys.executable, str(here / f"{name}.py")], check=False).returncode
        )
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
