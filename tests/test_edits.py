"""Taking changes back: bit for bit, and at the price of one copy of what changed."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from durometer.core.edits import Restoration, RestoreError

Model = Any
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"


def state(model: Model) -> dict[str, tuple[bytes, torch.dtype, bool, bool]]:
    """Everything that has to come back: bits, dtype, gradient flag, gradient."""
    return {
        name: (
            p.detach().reshape(-1).view(torch.uint8).numpy().tobytes(),
            p.dtype,
            p.requires_grad,
            p.grad is not None,
        )
        for name, p in model.named_parameters()
    }


def adapt(model: Model, restoration: Restoration) -> None:
    """Put LoRA on the linear maps of ``model`` itself, in training mode."""
    import peft

    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    restoration.on_exit(wrapped.unload)


@torch.no_grad()
def scale(model: Model, restoration: Restoration) -> None:
    for parameter in restoration.writable([UP, DOWN]):
        parameter.mul_(1.7)


@torch.no_grad()
def not_a_number(model: Model, restoration: Restoration) -> None:
    (parameter,) = restoration.writable([UP])
    parameter.fill_(math.nan)


def replace_data(model: Model, restoration: Restoration) -> None:
    (parameter,) = restoration.writable([UP])
    parameter.data = torch.zeros_like(parameter)


def replace_parameter(model: Model, restoration: Restoration) -> None:
    restoration.writable([UP])
    module = model.model.layers[0].mlp.up_proj
    module.weight = nn.Parameter(torch.zeros_like(module.weight))


def train(model: Model, restoration: Restoration) -> None:
    """One step of descent on every weight; leaves gradients and training mode behind."""
    names = [name for name, _ in model.named_parameters()]
    parameters = restoration.writable(names)
    for parameter in parameters:
        parameter.requires_grad_(True)
    model.train()
    ids = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(parameters, 0.5).step()


def freeze(model: Model, restoration: Restoration) -> None:
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 == 0)
    model.train()


def adapter(model: Model, restoration: Restoration) -> None:
    adapt(model, restoration)
    model.train()


def scale_under_an_adapter(model: Model, restoration: Restoration) -> None:
    """The weights are announced once before and once after the adapter renames them."""
    (first,) = restoration.writable([UP])
    adapt(model, restoration)
    (second,) = restoration.writable([DOWN])
    with torch.no_grad():
        first.mul_(2.0)
        second.zero_()
    assert restoration.changes()[UP] > 0.0
    assert restoration.changes()[DOWN] > 0.0


Change = Callable[[Model, Restoration], None]
CHANGES: list[Change] = [
    scale,
    not_a_number,
    replace_data,
    replace_parameter,
    train,
    freeze,
    adapter,
    scale_under_an_adapter,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_is_taken_back_bit_for_bit(
    make_model: Callable[..., Model], change: Change, tied: bool, dtype: torch.dtype
) -> None:
    model = make_model("Llama", tie_word_embeddings=tied).to(dtype)
    model.model.norm.weight.requires_grad_(False)
    before = state(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = model(ids).logits
    restoration = Restoration(model)
    change(model, restoration)
    assert state(model) != before
    restoration.restore()
    assert state(model) == before
    assert not model.training
    assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_comes_back(tiny_llama: Model, training: bool) -> None:
    tiny_llama.train(training)
    restoration = Restoration(tiny_llama)
    tiny_llama.train(not training)
    restoration.restore()
    assert {module.training for module in tiny_llama.modules()} == {training}


def test_each_changed_weight_is_copied_once_and_no_other(
    tiny_llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []
    clone = torch.Tensor.clone

    def counting(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        copied.append(tensor.numel())
        return clone(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "clone", counting)
    restoration = Restoration(tiny_llama)
    assert copied == []
    for names in ([UP], [UP, DOWN], (name for name in (DOWN, UP, DOWN))):
        for parameter in restoration.writable(names):
            parameter.data.add_(1.0)
    restoration.changes()
    restoration.restore()
    sizes = {name: parameter.numel() for name, parameter in tiny_llama.named_parameters()}
    assert sum(copied) == sizes[UP] + sizes[DOWN]
    assert len(copied) == 2


def test_the_copy_is_of_the_first_state(tiny_llama: Model) -> None:
    """Announcing again after a change must not take the changed weights for the original."""
    before = state(tiny_llama)
    restoration = Restoration(tiny_llama)
    for _ in range(3):
        (parameter,) = restoration.writable([UP])
        parameter.data.mul_(2.0)
    restoration.restore()
    assert state(tiny_llama) == before


def test_writable_returns_the_weights_in_the_order_asked_for(tiny_llama: Model) -> None:
    restoration = Restoration(tiny_llama)
    expected = [tiny_llama.get_parameter(name) for name in (DOWN, UP)]
    for names in ([DOWN, UP], iter([DOWN, UP])):
        found = restoration.writable(names)
        assert [id(parameter) for parameter in found] == [id(parameter) for parameter in expected]


def test_an_unknown_weight_is_named(tiny_llama: Model) -> None:
    with pytest.raises(KeyError, match="no_such"):
        Restoration(tiny_llama).writable(["model.no_such.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changes_are_norms_by_name(tiny_llama: Model, dtype: torch.dtype) -> None:
    model = tiny_llama.to(dtype)
    restoration = Restoration(model)
    up, _ = restoration.writable([UP, DOWN])
    with torch.no_grad():
        old = up.double()
        up.mul_(1.5)
    expected = (up.double() - old).norm().item()
    assert restoration.changes() == {UP: pytest.approx(expected, rel=1e-5), DOWN: 0.0}
    restoration.restore()
    assert restoration.changes() == {}


def test_callbacks_run_once_the_last_first_and_before_the_weights(tiny_llama: Model) -> None:
    restoration, order = Restoration(tiny_llama), list[Any]()
    (parameter,) = restoration.writable([UP])
    old = parameter.detach().clone()

    def spoil() -> None:
        parameter.data.fill_(3.0)

    restoration.on_exit(lambda: order.append("first"))
    restoration.on_exit(spoil)
    restoration.on_exit(lambda: order.append("last"))
    restoration.restore()
    assert order == ["last", "first"]
    assert torch.equal(parameter, old)
    restoration.restore()
    assert order == ["last", "first"]


def left_adapter(model: Model) -> None:
    import peft

    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))


def new_weight(model: Model) -> None:
    model.model.extra = nn.Linear(2, 2)


def removed_layer(model: Model) -> None:
    del model.model.layers[1]


@pytest.mark.parametrize("leave", [left_adapter, new_weight, removed_layer])
def test_a_model_of_other_weights_is_not_restored(
    tiny_llama: Model, leave: Callable[[Model], None]
) -> None:
    restoration = Restoration(tiny_llama)
    leave(tiny_llama)
    with pytest.raises(RestoreError, match="before the tamper"):
        restoration.restore()
