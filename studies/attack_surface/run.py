"""The attack surface as a table: every tamper on a tiny random model of every family.

Runs what ``tests/test_attack_surface.py`` asserts and writes down what it found: whether the tamper
runs or refuses and why, how many weights it changes, whether the model is restored bit for bit, and
the seconds it takes.

    python studies/attack_surface/run.py      # a few minutes; results/attack_surface.json
"""

import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results" / "attack_surface.json"
sys.path.insert(0, str(ROOT / "tests"))

import conftest  # noqa: E402
import test_attack_surface as surface  # noqa: E402
import tiny_world  # noqa: E402
import torch  # noqa: E402

from durometer.subjects.fingerprint import weights_fingerprint  # noqa: E402


def one_case(make_model: Any, partner: Path, name: str, architecture: str) -> dict[str, Any]:
    """Return what one tamper does on one family."""
    model = make_model(architecture, **surface.ARCHITECTURES[architecture])
    subject = tiny_world.as_subject(model)
    before = weights_fingerprint(model)
    begun = time.perf_counter()
    tamper = surface.short(name, partner, architecture)
    done, refusal = surface.attack_or_refusal(subject, tamper)
    seconds = time.perf_counter() - begun
    found: dict[str, Any] = {"outcome": "refuses", "reason": refusal, "changed_weights": 0}
    if done is not None:
        outcome = "runs" if done.realised.status == "done" else done.realised.status
        found["outcome"], found["reason"] = outcome, done.realised.reason
        found["changed_weights"] = done.realised.changed_weights
    return found | {
        "restored": weights_fingerprint(model) == before,
        "seconds": round(seconds, 3),
    }


def main() -> None:
    """Run every case and write the table."""
    torch.set_num_threads(1)
    make_model = conftest.make_tiny_model
    with tempfile.TemporaryDirectory() as place:
        partners = {
            architecture: surface.save_partner(make_model, architecture, Path(place, architecture))
            for architecture in surface.ARCHITECTURES
        }
        # What the first case of all would load.
        one_case(make_model, partners["Llama"], "lora", "Llama")
        cases = {
            name: {
                architecture: one_case(make_model, partners[architecture], name, architecture)
                for architecture in surface.ARCHITECTURES
            }
            for name in surface.NAMES
        }
    seconds = sorted(case["seconds"] for row in cases.values() for case in row.values())
    table = {
        "architectures": list(surface.ARCHITECTURES),
        "versions": {name: version(name) for name in ("durometer", "torch", "transformers")},
        "cases": len(seconds),
        "seconds": {
            "median": seconds[len(seconds) // 2],
            "share_within_0.3": sum(s <= 0.3 for s in seconds) / len(seconds),
            "largest": seconds[-1],
        },
        "tampers": cases,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
    print(f"{len(seconds)} cases, {table['seconds']}: {RESULTS}")


if __name__ == "__main__":
    main()
