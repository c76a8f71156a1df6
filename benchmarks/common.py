"""What the benchmarks share: the machine's description, timing, and writing result files."""

import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> dict[str, Any]:
    """Describe the machine and the versions on it."""
    names = ("durometer", "torch", "transformers", "peft", "accelerate")
    model = "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }


def peak_memory_mib() -> float:
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alternate(
    first: Callable[[], object], second: Callable[[], object], rounds: int
) -> tuple[list[float], list[float]]:
    """Time both functions in turn, so that a busy moment of the machine hits both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, seconds in ((first, times[0]), (second, times[1])):
            begun = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begun)
    return times


def ratio(baseline: list[float], ours: list[float]) -> dict[str, Any]:
    """Summarise paired timings: medians, and the median of the paired ratios."""
    paired = [b / o for b, o in zip(baseline, ours, strict=True)]
    return {
        "baseline_seconds": statistics.median(baseline),
        "ours_seconds": statistics.median(ours),
        "ratio": statistics.median(paired),
        "ratio_low": min(paired),
        "ratio_high": max(paired),
        "rounds": len(paired),
    }


def write(name: str, result: dict[str, Any]) -> Path:
    """Write a result with the machine's description, and return the file."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n")
    return path
