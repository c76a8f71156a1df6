"""RepNoise: what the MLPs say of restricted answers becomes noise, at every depth."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch

from durometer.core.rows import Row
from durometer.core.settings import Between, setting
from durometer.safeguards.base import (
    Safeguard,
    Term,
    TrainingSettings,
    Visit,
    safeguard,
    supervised,
)
from durometer.safeguards.data import DefenceData
from durometer.safeguards.lens import logit_lens, unlearning
from durometer.safeguards.passes import Pass
from durometer.safeguards.train import Step
from durometer.subjects.base import Subject

KERNELS, RATIO = 5, 2.0


class RepNoiseSettings(TrainingSettings):
    """Settings of ``repnoise``; its authors advise to search them anew for every subject."""

    steps: int = setting(1250, "updates: one epoch of 10,000 pairs", ge=1)
    learning_rate: float = setting(2e-5, "peak learning rate", gt=0)
    batch_size: int = setting(8, "rows of each pool an update", ge=2)
    noise: float = setting(
        0.001,
        "coefficient of the distance of MLP outputs on restricted rows from noise (beta)",
        search=Between(1e-4, 10.0, log=True),
        ge=0,
    )
    ascent: float = setting(
        1.0,
        "coefficient of the gain in log(1 + cross-entropy of restricted answers, read off at every "
        "depth) (alpha)",
        search=Between(0.01, 4.0, log=True),
        ge=0,
    )


@safeguard("repnoise", aliases=("representation_noising",))
class RepNoise(Safeguard[RepNoiseSettings]):
    """``L(S) + beta mean_l MMD(m_l, N(0, I)) - alpha log(1 + mean_l CE_l)`` on restricted rows.

    ``m_l`` are MLP outputs, ``CE_l`` the cross-entropy that the final norm and the head read off
    the residual state at depth l. Where every restricted prompt has a refusal, only tokens at which
    the answer differs from it count. A sample of the MMD is one token's output; the released code
    takes a padded row as one, so that its distance depends on lengths, and zeroes logits outside
    the mask, which adds a constant loss there.
    """

    summary = "make MLP outputs on restricted answers like noise, and their answers unlikely"
    cost = "2 passes a step, one output head a block"
    source = "arXiv 2405.14577; domenicrosati/representation-noising"
    cannot_show = "resistance beyond its own data set, or to many steps (2412.07097)"
    settings_class = RepNoiseSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "steps": 150,
            "learning_rate": 1e-3,
            "schedule": "linear",
            "train": "adapter",
            "batch_size": 32,
            "sft": 3.0,
            "noise": 0.003,
        }
    }

    _generator: torch.Generator

    def visits(self, step: Step) -> Iterator[Visit]:
        """Give this step's noise a seed of its own, so that a resumed run draws the same."""
        self._generator = step.random("noise")
        yield Visit()

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the supervised loss, the distance from noise and the loss at all depths."""
        settings, partners = self.settings, paired(data)
        lens = logit_lens(subject, "ascent") if settings.ascent else None

        def noise(one: Pass) -> torch.Tensor:
            places = differing_tokens(one, partners)
            outputs = [state[places] for state in one.states("mlp")]
            return torch.stack([mmd(m, self._like(m)) for m in outputs]).mean()

        def ascent(one: Pass) -> torch.Tensor:
            assert lens is not None
            labels = differing_labels(one, partners)
            states = [state[labels] for state in one.states(tokens=False)]
            return unlearning(lens, states, one.labelled.targets[labels])

        def term(name: str, coefficient: float, loss: Any, role: Any) -> Term:
            return Term(name, coefficient, "restricted", loss, "batch", reads=(role,), whole=True)

        return [
            supervised(settings),
            term("noise", settings.noise, noise, "mlp"),
            term("ascent", settings.ascent, ascent, "residual"),
        ]

    def _like(self, outputs: torch.Tensor) -> torch.Tensor:
        return torch.randn(outputs.shape, generator=self._generator).to(outputs.device)


def paired(data: DefenceData) -> dict[str, Row]:
    """Return the refusal of each restricted item by id, in refusal domains; else nothing.

    A knowledge domain's prompts are not refused but forgotten, so nothing of a row is spared there.
    """
    if data.domain.kind != "refusal":
        return {}
    return {answer.item_id: refusal for refusal, answer in data.pool("pairs")}


def _differs(row: Row, partner: Row | None, place: int) -> bool:
    if partner is None:
        return place >= row.first_label
    return place >= len(partner.ids) or row.ids[place] != partner.ids[place]


def differing_labels(one: Pass, partners: Mapping[str, Row]) -> torch.Tensor:
    """Return which labels differ from the refusal's token at their place, shape [labels], bool.

    Without a refusal all do.
    """
    flags = [
        _differs(row, partners.get(row.item_id), place)
        for row in one.rows
        for place in range(row.first_label, len(row.ids))
    ]
    return torch.tensor(flags, device=one.labelled.logits.device)


def differing_tokens(one: Pass, partners: Mapping[str, Row]) -> torch.Tensor:
    """Return which tokens that are read differ from the refusal's, shape [tokens], bool.

    Without a refusal those that predict a label: the last of the prompt decides on the answer.
    """
    flags = []
    for row in one.rows:
        partner = partners.get(row.item_id)
        ahead = 0 if partner else 1
        flags += [_differs(row, partner, place + ahead) for place in range(len(row.ids) - 1)]
    return torch.tensor(flags, device=one.labelled.logits.device)


def mmd(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the squared maximum mean discrepancy of two samples, summed over five RBF kernels.

    The bandwidths are the mean squared distance of different points times 1/4, 1/2, 1, 2 and 4;
    that scale has no gradient.

    Args:
        left: shape [n, width].
        right: shape [m, width].
    """
    points = torch.cat([left, right])
    squares = (points**2).sum(-1)
    # Products rather than differences: no tensor of [points, points, width].
    distances = (squares[:, None] + squares - 2 * points @ points.T).clamp_min(0)
    count = len(points)
    scale = distances.detach().sum() / (count * (count - 1))
    kernel = torch.stack(
        [torch.exp(-distances / (scale * RATIO ** (i - KERNELS // 2))) for i in range(KERNELS)]
    ).sum(0)
    n = len(left)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
