"""Biases of linear maps that a model family allows and a model does not have."""

from typing import Any

import torch
from torch import nn

from durometer.core.errors import NotApplicableError

# Settings of model families that give linear maps a bias; without it a bias could not be saved.
FLAGS = ("mlp_bias", "use_mlp_bias", "use_bias", "bias")


def give_biases(model: Any, module: str) -> str:
    """Give the map ``module``, and those that go with it, zero biases.

    Returns:
        the setting of the model's configuration that does it, now on.

    Raises:
        NotApplicableError: no setting of the family gives this map a bias.
    """
    text = model.config.get_text_config()
    own = {name for name, _ in model.named_parameters()}
    for flag in FLAGS:
        if getattr(text, flag, None) is not False:
            continue
        setattr(text, flag, True)
        with torch.device("meta"):
            fresh = dict(type(model)(model.config).named_parameters())
        new = [name for name in fresh if name not in own]
        if f"{module}.bias" in new and all(name.endswith(".bias") for name in new):
            for name in new:
                place = model.get_submodule(name.removesuffix(".bias"))
                zeros = torch.zeros(fresh[name].shape).to(place.weight)
                place.bias = nn.Parameter(zeros, requires_grad=False)
            return flag
        setattr(text, flag, False)
    raise NotApplicableError(
        f"{module} needs a bias, and models of type '{model.config.model_type}' have none there"
    )
