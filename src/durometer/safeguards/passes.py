"""One forward pass as loss terms see it: logits and activations at the places that count."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from durometer.core.errors import NotApplicableError
from durometer.core.forward import Forward, Labelled
from durometer.core.rows import Row
from durometer.core.structure import blocks
from durometer.safeguards.base import Role


class ActivationBank:
    """Records activations of a model by role while it is on.

    ``residual`` is the embedding and the output of every block, ``mlp`` and ``attention`` the
    output of each block's module of that kind.

    Attributes:
        states: the last pass's activations by role, each of shape [batch, length, width].
    """

    def __init__(self, model: nn.Module, roles: Sequence[Role]) -> None:
        self.states: dict[Role, list[torch.Tensor]] = {role: [] for role in roles}
        self._modules = {role: sites(model, role) for role in roles}
        self._model = model

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record every pass inside; a new pass replaces what the last one left."""

        def clear(*_: Any) -> None:
            for states in self.states.values():
                states.clear()

        with ExitStack() as stack:
            stack.callback(self._model.register_forward_pre_hook(clear).remove)
            for role, modules in self._modules.items():
                for module in modules:
                    stack.callback(module.register_forward_hook(self._taker(role)).remove)
            yield

    def _taker(self, role: Role) -> Any:
        def take(module: nn.Module, inputs: Any, output: Any) -> None:
            self.states[role].append(output[0] if isinstance(output, tuple) else output)

        return take


def sites(model: nn.Module, role: Role) -> list[nn.Module]:
    """Return the modules whose outputs are the activations of ``role``, in order.

    Raises:
        NotApplicableError: a block without such a module.
    """
    found = [block for _, block in blocks(model)]
    if role == "residual":
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        return [embedding, *found]
    return [_part(block, role) for block in found]


_OTHERS = ("norm", "dropout")


def _part(block: nn.Module, role: Role) -> nn.Module:
    words = ("mlp", "feed_forward", "moe") if role == "mlp" else ("attn", "attention")
    for name, module in block.named_children():
        if any(word in name for word in words) and not any(other in name for other in _OTHERS):
            return module
    raise NotApplicableError(f"no module for '{role}' in a block")


class Pass:
    """What one forward pass gives to the loss terms.

    Args:
        rows: the rows of this pass.
        labelled: their logits and places.
        states: recorded activations by role, see ``ActivationBank``.
        reference: the frozen model, if any.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        labelled: Labelled,
        states: dict[Role, list[torch.Tensor]],
        reference: "Reference | None",
    ) -> None:
        self.rows = list(rows)
        self.labelled = labelled
        self._states = states
        self._frozen = reference

    @cached_property
    def log_probabilities(self) -> torch.Tensor:
        """Log-probabilities at the labels, fp32, shape [labels, vocabulary]."""
        return self.labelled.logits.float().log_softmax(-1)

    def cross_entropy(self) -> torch.Tensor:
        """Return the cross-entropy of each label, nats, shape [labels]."""
        logits = self.labelled.logits.float()
        return functional.cross_entropy(logits, self.labelled.targets, reduction="none")

    def log_likelihood(self) -> torch.Tensor:
        """Return the log-probability of each label, shape [labels]."""
        return self.log_probabilities.gather(1, self.labelled.targets[:, None])[:, 0]

    def entropy(self) -> torch.Tensor:
        """Return the entropy of the prediction of each label, nats, shape [labels]."""
        return -(self.log_probabilities.exp() * self.log_probabilities).sum(-1)

    def row_log_likelihood(self) -> torch.Tensor:
        """Return the summed log-probability of each row's labels, shape [rows]."""
        sums = torch.zeros(len(self.rows), device=self.labelled.logits.device)
        places = self.labelled.rows - self.labelled.members[0]
        return sums.index_add(0, places, self.log_likelihood())

    def states(self, role: Role = "residual", *, tokens: bool = True) -> list[torch.Tensor]:
        """Return the activations of every site of ``role``, fp32.

        Args:
            tokens: at all tokens of all rows but each one's last, shape [tokens, width]; else
                where labels are predicted, shape [labels, width].
        """
        places = self.token_places[1] if tokens else self.labelled.predictors
        return [state.flatten(0, 1)[places].float() for state in self._states[role]]

    @cached_property
    def token_places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row (within this pass) and place in the flattened input of every token, [tokens]."""
        row, place = self.labelled.reach.nonzero(as_tuple=True)
        return row, place

    @cached_property
    def token_ids(self) -> torch.Tensor:
        """Ids of the tokens, in the order of ``token_places``, shape [tokens]."""
        flat = [token for row in self.rows for token in row.ids[:-1]]
        return torch.tensor(flat, device=self.labelled.logits.device)

    @cached_property
    def reference(self) -> "Pass":
        """The same rows through the frozen model.

        Raises:
            RuntimeError: the safeguard declared no reference.
        """
        if self._frozen is None:
            raise RuntimeError("the safeguard declares no reference")
        return self._frozen.look(self.rows, tuple(self._states))


class Reference:
    """A frozen copy of a model, for terms that compare with it.

    States are computed when needed, not kept: they take more room than the weights.
    """

    def __init__(self, model: nn.Module, *, tree: bool) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self._forward = Forward(self.model, tree=tree)
        self.forwards = 0

    @torch.no_grad()
    def look(self, rows: Sequence[Row], roles: Sequence[Role]) -> Pass:
        """Return one pass of all ``rows``."""
        bank = ActivationBank(self.model, roles)
        self.forwards += 1
        with bank.recording():
            (labelled,) = self._forward.labelled(rows, whole=True)
        return Pass(rows, labelled, bank.states, None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let ``model`` compute as in use inside, without dropout, and then as before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def passes(
    forward: Forward,
    rows: Sequence[Row],
    roles: Sequence[Role],
    reference: Reference | None,
    *,
    whole: bool,
    unit: int = 1,
) -> Iterator[Pass]:
    """Yield ``rows`` pass by pass; gradients flow, and a pass is to be used before the next.

    Args:
        whole, unit: what must be in one pass, see ``Forward.labelled``.
    """
    bank = ActivationBank(forward.model, roles)
    with bank.recording():
        for labelled in forward.labelled(rows, whole=whole, unit=unit):
            members = [rows[index] for index in labelled.members]
            yield Pass(members, labelled, bank.states, reference)
