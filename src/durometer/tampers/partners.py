"""Other checkpoints that a tamper merges with: loaded, matched tensor by tensor, let go again."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import nn

from durometer.core.budget import Budget, Spent
from durometer.core.errors import NotApplicableError
from durometer.core.memory import release_free_memory
from durometer.core.merging import cosine_of
from durometer.core.seeds import Seeds
from durometer.core.settings import Settings
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.subjects.load import DtypeName, load_subject
from durometer.tampers.base import Access, OnCheckpoint, Realised
from durometer.tampers.ladder import Ladder

Tensors = Mapping[str, torch.Tensor]
S = TypeVar("S", bound=Settings)
# Checkpoints of one descent have cosines near 1, unrelated ones near 0.
SAME_DESCENT = 0.5
SAMPLED_ENTRIES = 2048


def merged_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all weights by name, tied ones once, and the buffers that are saved with them.

    DeepSeek-V3 keeps a trained value in a buffer, the correction of its routing scores.
    """
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    tensors = dict(model.named_parameters()) | buffers
    return {name: t.detach() for name, t in tensors.items() if t.is_floating_point()}


def undefended_or(subject: Subject, spec: str, setting: str) -> str:
    """Return ``spec``, or the subject's pre-safeguard checkpoint where it is ''.

    Raises:
        NotApplicableError: nobody knows that checkpoint.
    """
    chosen = spec or subject.source.undefended
    if not chosen:
        raise NotApplicableError(
            f"the checkpoint of '{subject.name}' before its safeguard is not known; name one with "
            f"the setting '{setting}'"
        )
    return chosen


def load_matching(subject: Subject, spec: str) -> tuple[Tensors, float]:
    """Return another checkpoint's tensors, and the cosine of a sample of them to the subject's.

    It is loaded in the subject's dtype onto the subject's device.

    Raises:
        NotApplicableError: another architecture, shape or vocabulary, or weights so different that
            neither checkpoint descends from the other or from a common one.
    """
    place = str(next(subject.model.parameters()).device)
    other = load_subject(spec, dtype=cast(DtypeName, subject.dtype), device=place)
    own, theirs = merged_tensors(subject.model), merged_tensors(other.model)
    _require_same_structure(own, theirs, spec)
    _require_same_tokens(subject, other, spec)
    cosine = sampled_cosine(own, theirs)
    if not cosine >= SAME_DESCENT:
        raise NotApplicableError(
            f"'{spec}' is no relative of '{subject.name}': the cosine of their weights is "
            f"{cosine:.2f}, below {SAME_DESCENT}"
        )
    return theirs, cosine


def sampled_cosine(first: Tensors, second: Tensors) -> float:
    """Return the cosine between evenly spaced entries of all matrices of two checkpoints.

    Vectors are left out: scales of norms are near 1 in every model.
    """
    pairs = [(first[name], second[name]) for name in first if first[name].dim() > 1]
    left = torch.cat([_sample(one) for one, _ in pairs])
    return cosine_of(left, torch.cat([_sample(other) for _, other in pairs]))


def differing(own: Tensors, *others: Tensors) -> list[str]:
    """Return the names of the tensors that are not the same bit for bit in all checkpoints."""
    return [n for n, tensor in own.items() if any(not torch.equal(tensor, o[n]) for o in others)]


def generator_for(seed: int, name: str) -> torch.Generator:
    """Return a generator of one tensor's own, whichever tensors are drawn before it."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@torch.no_grad()
def rewrite(
    subject: Subject, names: Iterable[str], make: Callable[[str, torch.Tensor], torch.Tensor]
) -> tuple[int, float]:
    """Replace the named tensors one after the other by what ``make(name, tensor)`` returns.

    Returns:
        The number of entries written, and the cosine between the change that arrived in the
        model's dtype and the one intended (1 where nothing was intended).
    """
    buffers = dict(subject.model.named_buffers())
    entries, product, arrived_square, meant_square = 0, 0.0, 0.0, 0.0
    for name in names:
        target = _announced(subject, name, buffers)
        old = target.float().clone()
        merged = make(name, target.detach()).float()
        target.copy_(merged)
        arrived, meant = (target.float() - old).flatten(), (merged - old).flatten()
        entries += target.numel()
        product += float(arrived @ meant)
        arrived_square += float(arrived @ arrived)
        meant_square += float(meant @ meant)
    norms = math.sqrt(arrived_square * meant_square)
    return entries, product / norms if norms else float(not meant_square)


def _announced(subject: Subject, name: str, buffers: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if name not in buffers:
        return subject.restoration.writable([name])[0]
    buffer = buffers[name]
    copy = buffer.clone()

    def back() -> None:
        buffer.copy_(copy)

    subject.restoration.on_exit(back)
    return buffer


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.flatten()
    return flat[:: max(len(flat) // SAMPLED_ENTRIES, 1)].float()


def _require_same_structure(own: Tensors, theirs: Tensors, spec: str) -> None:
    unmatched = sorted(own.keys() ^ theirs.keys())
    if unmatched:
        raise NotApplicableError(
            f"'{spec}' has another architecture: {len(unmatched)} tensors have no counterpart, "
            f"{unmatched[0]} for one"
        )
    for name, tensor in own.items():
        if tensor.shape != theirs[name].shape:
            shapes = f"{list(theirs[name].shape)}, not {list(tensor.shape)}"
            raise NotApplicableError(f"'{spec}' has other shapes: {name} is {shapes}")


def _require_same_tokens(subject: Subject, other: Subject, spec: str) -> None:
    own, theirs = subject.chat.tokenizer.get_vocab(), other.chat.tokenizer.get_vocab()
    shared = own.keys() & theirs.keys()
    moved = sum(own[token] != theirs[token] for token in shared)
    # Renamed reserved tokens and a few added ones do no harm; moved ones mix up the embeddings.
    if moved or 2 * len(shared) < max(len(own), len(theirs)):
        raise NotApplicableError(
            f"'{spec}' has another vocabulary: {moved} of {len(shared)} shared tokens moved"
        )


class PartnerLadder(Ladder[S]):
    """Base of edits towards other checkpoints, which are kept only while the tamper runs."""

    access: ClassVar[Access] = "weights"
    access_level = "A5"

    def __init__(self, settings: S) -> None:
        super().__init__(settings)
        self._loaded: dict[str, Tensors] = {}
        self._names: list[str] = []
        self._seeds = Seeds(0, 0, 0, 0)

    def run(
        self,
        subject: Subject,
        data: Domain,
        budget: Budget,
        seeds: Seeds,
        on_checkpoint: OnCheckpoint,
    ) -> Realised:
        """Try the strengths, and let go of the other checkpoints; see ``Tamper.run``."""
        self._seeds = seeds
        try:
            return super().run(subject, data, budget, seeds, on_checkpoint)
        finally:
            if self._loaded:
                self._loaded = {}
                self._names = []
                release_free_memory()

    def load(self, subject: Subject, setting: str, spec: str, realised: Realised) -> Tensors:
        """Return the tensors of ``spec``, loaded once a run; facts are recorded by ``setting``."""
        if spec not in self._loaded:
            self._loaded[spec], cosine = load_matching(subject, spec)
            realised.facts[f"{setting}_cosine"] = cosine
        realised.facts[setting] = spec
        return self._loaded[spec]

    def compare(self, subject: Subject, realised: Realised, spent: Spent) -> None:
        """Note which tensors differ between the subject and what was loaded."""
        self._names = differing(merged_tensors(subject.model), *self._loaded.values())
        realised.facts["tensors"] = len(self._names)

    def write(
        self,
        subject: Subject,
        strength: float,
        realised: Realised,
        make: Callable[[str, torch.Tensor], torch.Tensor],
    ) -> int:
        """Rewrite the tensors that differ; record how much of the change the dtype let through."""
        entries, cosine = rewrite(subject, self._names, make)
        arrived: dict[str, Any] = realised.facts.setdefault("applied_cosine", {})
        arrived[f"{strength:g}"] = cosine
        return entries
