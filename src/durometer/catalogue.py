"""Imports every built-in method, so that the registries know them all."""

from durometer.domains import capitals, world
from durometer.measures import likelihood, responses
from durometer.safeguards import refusal
from durometer.subjects import builtin
from durometer.tampers import benign_finetune, finetune, lora

__all__ = [
    "benign_finetune",
    "builtin",
    "capitals",
    "finetune",
    "likelihood",
    "lora",
    "refusal",
    "responses",
    "world",
]
