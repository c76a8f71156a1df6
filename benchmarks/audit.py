"""Reading the weights of ``smollm2`` against its base: time and memory of the whole comparison.

The base is the model's own file, mapped; the subject is the same file changed while it is read, so
that neither has to fit into memory: a direction taken out of what writes into the residual stream
and noise on all other matrices, everything rounded to bf16. No tensor is equal, so every detector
looks at every one: the slowest case.
"""

import time
from typing import Any

import numpy as np
from common import peak_memory_mib, write

from durometer.audit.forensics import alone, compare
from durometer.audit.forensics.linear_algebra import Array, rounded
from durometer.audit.tensors import SafetensorsSource
from durometer.findings import Finding
from durometer.subjects.builtin import smollm2_folder


class Changed(SafetensorsSource):
    """The file with a direction removed and noise added, drawn by name."""

    def read(self, name: str) -> Array:
        value: Any = super().read(name)
        if value.ndim == 2 and ("o_proj" in name or "down_proj" in name):
            v = np.random.default_rng(0).standard_normal(len(value)).astype(np.float32)
            v /= np.linalg.norm(v)
            value = value - np.float32(0.1) * np.outer(v, v @ value)
        elif value.ndim == 2:
            generator = np.random.default_rng(len(name))
            noise = generator.standard_normal(value.shape, dtype=np.float32)
            value = value + np.float32(0.003) * value.std() * noise
        return rounded(np.ascontiguousarray(value), "BF16")


def timed(run: Any) -> tuple[dict[str, float], list[Finding]]:
    wall, processor = time.perf_counter(), time.process_time()
    found = run()
    seconds = {
        "wall_seconds": time.perf_counter() - wall,
        "processor_seconds": time.process_time() - processor,
    }
    return seconds, found


def main() -> None:
    file = smollm2_folder() / "model.safetensors"
    before = peak_memory_mib()
    both, found = timed(lambda: compare(Changed(file), SafetensorsSource(file)))
    peak = peak_memory_mib()
    single, _ = timed(lambda: alone(SafetensorsSource(file)))
    result = {
        "file_mib": file.stat().st_size / 2**20,
        "compare": both,
        "without_a_base": single,
        "peak_memory_mib": peak,
        "memory_before_mib": before,
        "findings": {finding.check: finding.title for finding in found},
    }
    print(write("audit", result).read_text())


if __name__ == "__main__":
    main()
