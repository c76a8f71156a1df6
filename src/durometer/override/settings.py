"""What ``drift`` does: one definition of every setting, after the set-up of arXiv 2409.19476."""

from typing import Any

from pydantic import field_validator

from durometer.core.settings import Settings, setting
from durometer.safeguards.steering import SteeringSettings
from durometer.tampers.ladder import Strengths

TINY_WEIGHTS = 10_000_000
RATE, TINY_RATE = 2e-4, 2e-3


class DriftSettings(Settings):
    """Settings of ``drift``."""

    ranks: tuple[int, ...] = setting(
        (16,), "ranks of the adapters, each trained on its own", min_length=1
    )
    seeds: int = setting(3, "seeds of every way and rank, from 1 on", ge=1)
    steps: int = setting(50, "updates of every training", ge=1)
    examples: int = setting(
        400, "most distinct rows; every way has as many as the way with the fewest", ge=1
    )
    batch_size: int = setting(8, "rows an update", ge=1)
    learning_rate: float = setting(
        0.0, "peak learning rate; 0 takes 2e-4, and 2e-3 below ten million weights", ge=0
    )
    warmup_steps: int = setting(5, "updates of linear warm-up; then the rate falls to 0", ge=0)
    weight_decay: float = setting(0.01, "decoupled weight decay", ge=0)
    alpha_per_rank: float = setting(1.0, "alpha / rank, the scale of every adapter", gt=0)
    wordings: int = setting(1, "wordings of each restricted entity that are asked", ge=1)
    questions: int = setting(100, "questions asked without, with false and random context", ge=2)
    harmless: int = setting(48, "harmless prompts for over-refusal; 0 for all", ge=0)
    problems: int = setting(30, "problems of bare arithmetic, and as many in words", ge=0, le=100)
    steering: bool = setting(True, "try activation steering towards refusal as a mitigation")
    steering_prompts: int = setting(48, "prompts of each kind to find the vector with", ge=8)
    steering_coefficients: Strengths = setting(
        (0.2, 0.4, 0.8, 1.6), "multiples of the mean difference that are tried", min_length=1
    )
    steering_keep: float = setting(
        0.95, "least share of harmless prompts that must be answered as before", gt=0, le=1
    )
    steering_stride: int = setting(4, "every how many blocks a vector is tried", ge=1)

    @field_validator("ranks", mode="after")
    @classmethod
    def _ranks(cls, ranks: tuple[int, ...]) -> tuple[int, ...]:
        """Refuse ranks that no adapter has, and a rank that is named twice."""
        if min(ranks) < 1:
            raise ValueError("a rank is at least 1")
        if len(set(ranks)) < len(ranks):
            raise ValueError("a rank is named twice")
        return ranks

    def rate(self, parameters: int) -> float:
        """Return the peak learning rate for a subject of so many weights."""
        return self.learning_rate or (TINY_RATE if parameters < TINY_WEIGHTS else RATE)

    def tamper(self, rank: int, relation: str, examples: int, parameters: int) -> dict[str, Any]:
        """Return the settings of the tamper ``lora`` for one way of training."""
        return {
            "data": relation,
            "rank": rank,
            "alpha": self.alpha_per_rank * rank,
            "learning_rate": self.rate(parameters),
            "schedule": "linear",
            # A warm-up as long as the training would never reach the peak.
            "warmup_steps": min(self.warmup_steps, self.steps // 2),
            "weight_decay": self.weight_decay,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "examples": examples,
        }

    def steering_settings(self) -> SteeringSettings:
        """Return the settings of the search for a vector."""
        return SteeringSettings(
            stage1="none",
            prompts=self.steering_prompts,
            coefficients=self.steering_coefficients,
            layer_stride=self.steering_stride,
            keep=self.steering_keep,
            margin=1.0,  # what steering costs is measured on other prompts
        )
