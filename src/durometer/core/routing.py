"""Routers of mixtures of experts, found by shape and role, and masks on what they choose.

In transformers 5 the experts of a layer are fused into tensors ``[E, ...]``; the router beside
them has a weight ``[E, width]`` and returns logits ``[T, E]``, weights and indices ``[T, k]``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from durometer.core.errors import NotApplicableError
from durometer.core.experts import LAST_MAP
from durometer.core.rows import Row

Semantics = Literal["route_mask", "output_zero", "down_weight", "soft_mask", "soft_favour"]

# How far a softly masked logit is moved beyond the others (SteerMoE, arXiv 2509.09660).
SOFT_STEP = 0.01


@dataclass(frozen=True)
class Router:
    """One layer's router.

    Attributes:
        name: as in ``named_modules``.
        experts: number of routed experts, E (shared ones are not routed).
        chosen: experts that a token goes to, k.
        groups, open_groups: groups of experts, and how many of them a token may choose from.
        last_map: name of the parameter that holds the experts' last maps; '' where none is known.
    """

    name: str
    module: nn.Module
    experts: int
    chosen: int
    groups: int
    open_groups: int
    last_map: str


def routers(model: nn.Module) -> list[Router]:
    """Return the routers of all mixtures of experts in the model, in order.

    Raises:
        NotApplicableError: the model is dense, or routes some experts in a way not known here.
    """
    found = []
    for name, module in model.named_modules():
        for child_name, child in module.named_children():
            experts = _fused_experts(child)
            if experts:
                where = f"{name}.{child_name}".lstrip(".")
                found.append(_router_beside(name, module, child, experts, where))
    if not found:
        raise NotApplicableError("no routed experts: the model is dense, or its experts not fused")
    return found


def idle_entries(model: nn.Module) -> int:
    """Return the entries of the fused experts to which a token does not go.

    Experts of a number that no router found scores are none of these. Routers are looked for
    anywhere: adapters on the experts are wrapped around them, so that none is beside them.
    """
    chosen = dict(_scored_and_chosen(module) for module in model.modules())
    idle = 0
    for module in model.modules():
        experts = _fused_experts(module)
        if experts and experts in chosen:
            size = sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
            idle += size // experts * (experts - chosen[experts])
    return idle


@torch.no_grad()
def routing_counts(
    model: nn.Module, found: Sequence[Router], rows: Sequence[Row], *, prompt: bool
) -> tuple[list[torch.Tensor], int]:
    """Count how often each expert is chosen: one tensor [E] a router, and the number of tokens.

    Args:
        prompt: count the tokens of the prompt; else those that predict the response.

    Raises:
        NotApplicableError: a router returns something else than logits, weights and indices.
    """
    counts = [torch.zeros(router.experts) for router in found]
    span, tokens = slice(0), 0

    def counting(number: int) -> Callable[..., None]:
        def add(module: nn.Module, inputs: Any, output: Any) -> None:
            _, indices = _weights_and_indices(found[number], output)
            chosen = indices[span].flatten().cpu()
            counts[number] += torch.bincount(chosen, minlength=found[number].experts)

        return add

    handles = [r.module.register_forward_hook(counting(i)) for i, r in enumerate(found)]
    device = next(model.parameters()).device
    try:
        for row in rows:
            first = row.first_label - 1
            span = slice(0, first + 1) if prompt else slice(first, len(row.ids) - 1)
            tokens += len(range(len(row.ids))[span])
            model(input_ids=torch.tensor([row.ids], device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return counts, tokens


def unmaskable(router: Router, masked: Sequence[int], semantics: Semantics) -> str:
    """Say why a mask leaves a layer without experts, or a token without enough; '' if it does not.

    A logit that is only moved leaves every expert to choose from.
    """
    if semantics in ("soft_mask", "soft_favour"):
        return ""
    free = torch.ones(router.experts)
    free[list(masked)] = 0
    by_group = free.view(router.groups, -1).sum(1)
    where = f"masking {len(masked)} of the {router.experts} experts of {router.name}"
    if not by_group.all():
        return f"{where} leaves none in a group; use a smaller share"
    fewest = int(by_group.sort().values[: router.open_groups].sum())
    if semantics == "route_mask" and fewest < router.chosen:
        return (
            f"{where} leaves {fewest} to choose from where a token needs {router.chosen}; use a "
            "smaller share or another semantics"
        )
    return ""


def mask(
    router: Router, masked: Sequence[int], semantics: Semantics, factor: float
) -> Callable[[], None]:
    """Mask experts of one router until the returned function is called.

    Args:
        semantics: ``route_mask`` gives them the logit -inf before the choice, so that the next
            expert fills in; ``output_zero`` lets them be chosen and contribute nothing;
            ``down_weight`` lets them contribute ``factor`` of what they would; ``soft_mask`` moves
            their logits ``SOFT_STEP`` below the least of the token's, ``soft_favour`` above the
            largest, so that they are chosen last or first.
    """
    marked = torch.zeros(router.experts, dtype=torch.bool)
    marked[list(masked)] = True
    marked = marked.to(next(router.module.parameters()).device)
    if semantics in ("route_mask", "soft_mask", "soft_favour"):
        return _mask_before_choice(router, marked, semantics)
    scale = factor if semantics == "down_weight" else 0.0

    def reweight(module: nn.Module, inputs: Any, output: Any) -> Any:
        weights, indices = _weights_and_indices(router, output)
        weights = torch.where(marked[indices], weights * scale, weights)
        return (output[0], weights, indices)

    return router.module.register_forward_hook(reweight).remove


def _mask_before_choice(
    router: Router, marked: torch.Tensor, semantics: Semantics
) -> Callable[[], None]:
    """Run the router's own code on masked logits, so that its scoring and scaling are its own."""
    put_back = _move_correction(router.module, marked, up=semantics == "soft_favour")

    def choose_again(module: nn.Module, inputs: Any, output: Any) -> Any:
        with _MaskedLogits(marked, semantics) as mode:
            output = type(module).forward(module, *inputs)
        weights, indices = _weights_and_indices(router, output)
        # A slot of weight 0 is no mass; sigmoid routers may fill one up with a masked expert.
        leak = semantics == "route_mask" and bool((weights * marked[indices]).any())
        if leak or not mode.hits:
            raise NotApplicableError(f"the router {router.name} cannot be masked at its logits")
        return output

    handle = router.module.register_forward_hook(choose_again)

    def undo() -> None:
        handle.remove()
        put_back()

    return undo


class _MaskedLogits(TorchFunctionMode):
    """Moves the logits of marked experts where a linear map gives one for each expert."""

    def __init__(self, marked: torch.Tensor, semantics: Semantics) -> None:
        super().__init__()
        self._marked = marked
        self._semantics = semantics
        self.hits = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is functional.linear and result.shape[-1] == len(self._marked):
            self.hits += 1
            return torch.where(self._marked, self._moved(result), result)
        return result

    def _moved(self, logits: torch.Tensor) -> torch.Tensor:
        if self._semantics == "route_mask":
            return logits.new_full((), -torch.inf)
        up = self._semantics == "soft_favour"
        end = logits.amax(-1, keepdim=True) if up else logits.amin(-1, keepdim=True)
        # Half precision would round a small step on a large logit away.
        step = (2 * torch.finfo(logits.dtype).eps * end.abs()).clamp(min=SOFT_STEP)
        return end + step if up else end - step


def _move_correction(module: nn.Module, marked: torch.Tensor, *, up: bool) -> Callable[[], None]:
    """Put marked experts last or first where choices are by ``sigmoid(logit) + correction``.

    Sigmoids are from 0 to 1, so a correction 1 beyond all others is enough, without an infinite
    one that would rule out the whole group in DeepSeek-V3's choice of groups.
    """
    correction = getattr(module, "e_score_correction_bias", None)
    if not isinstance(correction, torch.Tensor):
        return lambda: None
    copy = correction.detach().clone()
    beyond = float(copy.max()) + 1 if up else float(copy.min()) - 1
    correction.data.copy_(copy.masked_fill(marked, beyond))

    def put_back() -> None:
        correction.data.copy_(copy)

    return put_back


def _fused_experts(module: nn.Module) -> int:
    """Return how many experts a module holds fused in tensors of three dimensions; 0 for none."""
    sizes = {p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3}
    count = sum(p.dim() == 3 for p in module.parameters(recurse=False))
    return sizes.pop() if count > 1 and len(sizes) == 1 else 0


def _scored_and_chosen(module: nn.Module) -> tuple[int, int]:
    """Return how many experts a router scores and how many it chooses; 0 and 0 for no router."""
    weight, chosen = getattr(module, "weight", None), getattr(module, "top_k", None)
    if isinstance(weight, nn.Parameter) and weight.dim() == 2 and isinstance(chosen, int):
        return len(weight), chosen
    return 0, 0


def _router_beside(
    name: str, layer: nn.Module, fused: nn.Module, experts: int, where: str
) -> Router:
    for child_name, child in layer.named_children():
        scored, chosen = _scored_and_chosen(child)
        if scored == experts:
            groups = int(getattr(child, "num_group", None) or 1)
            opened = int(getattr(child, "topk_group", None) or groups)
            place = f"{name}.{child_name}"
            last = f"{where}.{LAST_MAP}" if hasattr(fused, LAST_MAP) else ""
            return Router(place, child, experts, chosen, groups, opened, last)
    raise NotApplicableError(f"no router found beside the experts {where}")


def _weights_and_indices(router: Router, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights and indices [T, k] out of what a router returned."""
    if isinstance(output, tuple) and len(output) == 3:
        _, weights, indices = output
        if not indices.is_floating_point() and weights.shape == indices.shape:
            return weights, indices
    raise NotApplicableError(
        f"the router {router.name} returns no weights and indices of the experts it chose"
    )
