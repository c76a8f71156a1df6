"""The logit lens: what the model would say if it ended at some depth."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from durometer.core.errors import NotApplicableError
from durometer.core.structure import blocks, width
from durometer.subjects.base import Subject

Lens = Callable[[torch.Tensor], torch.Tensor]


def logit_lens(subject: Subject, coefficient: str) -> Lens:
    """Return the map from residual states [tokens, width] to logits: final norm, then head.

    That these lead from the last residual state to the model's own logits is tried, not assumed.

    Args:
        coefficient: the setting that turns off what needs it.

    Raises:
        NotApplicableError: they do not, since something else stands there.
    """
    model = subject.model
    norm = last_norm(model)
    head = model.get_output_embeddings()

    def lens(states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = head(norm(states.to(head.weight.dtype))).float()
        return logits

    if not _is_whole(model, lens):
        raise NotApplicableError(
            "more than a norm and the output head stands behind the last block; "
            f"use {coefficient}=0"
        )
    return lens


@torch.no_grad()
def _is_whole(model: Any, lens: Lens) -> bool:
    seen: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = blocks(model)[-1][1].register_forward_hook(keep)
    ids = torch.arange(3, 9, device=next(model.parameters()).device)[None]
    try:
        logits = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        handle.remove()
    return bool((lens(seen[0]) - logits).abs().max() <= 1e-2 * logits.std())


def last_norm(model: nn.Module) -> nn.Module:
    """Return the norm between the last block and the head: the last one beside the blocks.

    Raises:
        NotApplicableError: there is none.
    """
    stack = model.get_submodule(".".join(blocks(model)[0][0].split(".")[:-2]))
    wide = torch.Size([width(model)])
    found = [
        module
        for module in stack.children()
        if (shapes := {p.shape for p in module.parameters()}) and shapes == {wide}
    ]
    if not found:
        raise NotApplicableError("no norm found between the last block and the head")
    return found[-1]


def unlearning(lens: Lens, states: Sequence[torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    """Return minus the log of 1 + the mean over depths of the cross-entropy read off there.

    Args:
        states: residual states, one tensor a depth, each of shape [labels, width].
        targets: shape [labels].

    Returns:
        one value, never above 0.
    """
    losses = [functional.cross_entropy(lens(state), targets) for state in states]
    return -torch.log1p(torch.stack(losses).mean())
