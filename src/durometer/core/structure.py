"""The parts of a model found by shape and role, never by one family's names."""

from typing import Any

from torch import nn

from durometer.core.errors import NotApplicableError


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the model's blocks (decoder layers) in order, with their names.

    Raises:
        NotApplicableError: no list of as many modules as the configuration counts layers.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise NotApplicableError("no list of blocks found in the model")
    name, chosen = max(lists, key=lambda entry: sum(p.numel() for p in entry[1].parameters()))
    return [(f"{name}.{index}", block) for index, block in enumerate(chosen)]


def width(model: nn.Module) -> int:
    """Return the width of the residual stream."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    return int(head.weight.shape[1] if head is not None else embedding.weight.shape[1])
