"""Controls: no safeguard at all, plain fine-tuning on the same data, noise of the same norm."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from durometer.core.errors import InputError
from durometer.core.settings import Settings, setting
from durometer.safeguards.base import Safeguard, TrainingSettings, safeguard
from durometer.safeguards.bench import Bench
from durometer.safeguards.data import DefenceData
from durometer.subjects.base import Subject
from durometer.subjects.record import RECORD


@safeguard("noop")
class NoOp(Safeguard[Settings]):
    """Nothing is changed: the pipeline itself must leave every bit as it is."""

    summary = "nothing at all: the subject as it is, bit for bit, through the whole pipeline"
    cost = "0"
    source = "control"
    cannot_show = "anything about a safeguard; it shows that the pipeline edits nothing"


@safeguard("plain_sft")
class PlainSft(Safeguard[TrainingSettings]):
    """Supervised fine-tuning on the rows that every other training safeguard begins with."""

    summary = "supervised fine-tuning on the safeguards' own rows, and nothing else"
    cost = "1 pass a step"
    source = "control"
    cannot_show = "a safeguard; what another one gains above it is its method, not its data"
    settings_class = TrainingSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"tiny": {"learning_rate": 1e-3}}


class NormNoiseSettings(Settings):
    """Settings of ``norm_noise``."""

    relative: float = setting(
        0.02, "norm of the noise on each matrix, relative to the matrix's own", gt=0
    )
    like: str = setting(
        "", "folder of a hardened model: noise of the norm by which it changed each weight"
    )
    seed: int = setting(1, "draws the noise")


@safeguard("norm_noise")
class NormNoise(Safeguard[NormNoiseSettings]):
    """Gaussian noise: an edit as large as another safeguard's, without its direction."""

    summary = "Gaussian noise of a given norm, or of the norm by which another safeguard edits"
    cost = "0 passes"
    source = "control"
    cannot_show = "durability: where it gains any, the measure rewards damage"
    settings_class = NormNoiseSettings

    def require(self, subject: Subject, data: DefenceData) -> None:
        """Look for the record to imitate, and whether it is of such a model."""
        if self.settings.like:
            # Biases may be those that an earlier stage makes.
            norms = recorded_norms(self.settings.like)
            self._require_weights(subject, [n for n in norms if not n.endswith(".bias")])

    def edit(self, bench: Bench) -> None:
        """Add the noise."""
        subject = bench.subject
        norms = self._norms(subject)
        generator = torch.Generator().manual_seed(self.settings.seed)
        with torch.no_grad():
            for name, parameter in subject.model.named_parameters():
                if norms.get(name):
                    noise = torch.randn(parameter.shape, generator=generator)
                    noise *= norms[name] / noise.norm()
                    parameter.copy_(parameter.float() + noise.to(parameter.device))

    def _norms(self, subject: Subject) -> dict[str, float]:
        if not self.settings.like:
            return {
                name: self.settings.relative * float(p.detach().float().norm())
                for name, p in subject.model.named_parameters()
                if p.dim() > 1
            }
        norms = recorded_norms(self.settings.like)
        self._require_weights(subject, list(norms))
        return norms

    def _require_weights(self, subject: Subject, names: Sequence[str]) -> None:
        missing = sorted(set(names) - {name for name, _ in subject.model.named_parameters()})
        if missing:
            path = Path(self.settings.like) / RECORD
            raise InputError(f"{path}: of another model: this one has no weight '{missing[0]}'")


def recorded_norms(folder: str) -> dict[str, float]:
    """Return the norm of the change of each weight, from the record of a hardened model's folder.

    Raises:
        InputError: there is no such record.
    """
    path = Path(folder) / RECORD
    try:
        changed = json.loads(path.read_text("utf-8"))["changed"]
        norms = {str(name): float(norm) for name, norm in changed.items()}
        if not all(math.isfinite(norm) and norm >= 0 for norm in norms.values()):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read; name a folder made by harden") from error
    return norms
