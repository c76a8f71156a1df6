"""``durometer demo`` after installation, with nothing cached: seconds and peak memory.

Usage: python benchmarks/demo.py [FOLDER]   (FOLDER keeps the run)
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import RESULTS, write


def main() -> None:
    """Run the demo in a process of its own and write ``results/demo.json``."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"DUROMETER_CACHE": str(Path(folder) / "cache")}
        command = [sys.executable, "-m", "durometer", "demo", "--out", str(Path(folder) / "run")]
        begun = time.perf_counter()
        finished = subprocess.run(command, env=environment, check=True)
        seconds = time.perf_counter() - begun
        RESULTS.mkdir(exist_ok=True)
        shutil.copy(Path(folder) / "run" / "summary.json", RESULTS / "demo_summary.json")
        for keep in sys.argv[1:]:
            shutil.copytree(Path(folder) / "run", keep)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    path = write(
        "demo",
        {
            "what": "durometer demo, empty cache, model file installed",
            "seconds": seconds,
            "peak_memory_gib": peak,
            "exit_code": finished.returncode,
        },
    )
    print(path.read_text())


if __name__ == "__main__":
    main()
