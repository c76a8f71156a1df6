"""Durometer: how hard is it to break the safeguards of an open-weight language model?"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from durometer.api import CampaignResult, screen_quantisation, stress
    from durometer.audit.command import audit_model
    from durometer.comparing import Comparison, compare, scoreboard
    from durometer.domains.load import load_domain
    from durometer.drifting import Drift, drift
    from durometer.recomputing import Recomputation, recompute
    from durometer.safeguards.harden import Hardened, harden
    from durometer.subjects.load import load_subject

try:
    __version__ = version("durometer")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "CampaignResult",
    "Comparison",
    "Drift",
    "Hardened",
    "Recomputation",
    "__version__",
    "audit_model",
    "compare",
    "drift",
    "harden",
    "load_domain",
    "load_subject",
    "recompute",
    "scoreboard",
    "screen_quantisation",
    "stress",
]

# Loaded on first use: `durometer --version` should not wait for torch.
_HOMES = {
    "CampaignResult": "durometer.api",
    "Comparison": "durometer.comparing",
    "compare": "durometer.comparing",
    "Drift": "durometer.drifting",
    "drift": "durometer.drifting",
    "Hardened": "durometer.safeguards.harden",
    "harden": "durometer.safeguards.harden",
    "Recomputation": "durometer.recomputing",
    "recompute": "durometer.recomputing",
    "scoreboard": "durometer.comparing",
    "screen_quantisation": "durometer.api",
    "stress": "durometer.api",
    "audit_model": "durometer.audit.command",
    "load_domain": "durometer.domains.load",
    "load_subject": "durometer.subjects.load",
}

_WITHOUT_TORCH = ("audit_model", "Recomputation", "recompute")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'durometer' has no attribute '{name}'")
    if name not in _WITHOUT_TORCH:
        import_module("durometer.catalogue")
    return getattr(import_module(_HOMES[name]), name)
