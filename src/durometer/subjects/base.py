"""The model under test, and the guarantee that it is left as it was found."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from durometer.core.edits import Restoration, RestoreError
from durometer.core.errors import DurometerError
from durometer.core.forward import Forward, supports_tree
from durometer.core.generation import GREEDY, Decoding
from durometer.domains.base import Item, Role
from durometer.subjects.chat import ChatFormat
from durometer.subjects.fingerprint import text_fingerprint, weights_checksum, weights_fingerprint


@dataclass(frozen=True)
class Source:
    """Where a subject came from.

    Attributes:
        kind: ``builtin``, ``folder``, ``hub``, ``gguf`` or ``adapter``.
        location: name, path or hub id.
        revision: pinned commit of a hub id, otherwise ''.
        undefended, reference: specs of a safeguarded subject's controls, where they are known.
    """

    kind: str
    location: str
    revision: str = ""
    undefended: str = ""
    reference: str = ""


@dataclass
class Subject:
    """A loaded model with its tokenizer and format.

    Attributes:
        name: short name for reports.
        model: causal language model of transformers.
        notes: what a user must be told about it (no chat template, say).
        restricted_chat: how an attacker asks restricted prompts; None: as everybody does. Only a
            tamper sets it, through ``ask_restricted``.
        decoding: how responses to restricted prompts are drawn, likewise.
    """

    name: str
    model: Any
    chat: ChatFormat
    source: Source
    notes: tuple[str, ...] = ()
    restricted_chat: ChatFormat | None = None
    decoding: Decoding = GREEDY
    _restoration: Restoration | None = field(default=None, repr=False)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights as loaded."""
        return weights_fingerprint(self.model)

    @cached_property
    def subject_fingerprint(self) -> str:
        """SHA-256 of weights, tokenizer, chat template and generation settings."""
        tokenizer = self.chat.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else str(sorted(tokenizer.get_vocab()))
        generation = getattr(self.model, "generation_config", None)
        settings = generation.to_json_string() if generation is not None else ""
        template = str(tokenizer.chat_template or "")
        return text_fingerprint(self.fingerprint, vocabulary, template, settings)

    @cached_property
    def tree(self) -> bool:
        """Whether batches can be laid out as trees of shared prefixes (tried once)."""
        return supports_tree(self.model)

    @property
    def forward(self) -> Forward:
        """The forward pass of the model as it is now."""
        return Forward(self.model, tree=self.tree)

    @property
    def parameters(self) -> int:
        """Number of weights, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def dtype(self) -> str:
        """Name of the dtype in which the subject computes."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    @property
    def restoration(self) -> Restoration:
        """What the current tamper must announce its changes to.

        Raises:
            DurometerError: outside ``restored()``, where nothing may be changed.
        """
        if self._restoration is None:
            raise DurometerError(f"subject '{self.name}' may be changed only inside restored()")
        return self._restoration

    def chat_for(self, item: Item) -> ChatFormat:
        """Return how ``item`` is asked: an attacker words restricted prompts as it likes."""
        if self.restricted_chat is not None and item.role == Role.RESTRICTED:
            return self.restricted_chat
        return self.chat

    def ask_restricted(
        self, chat: ChatFormat | None = None, decoding: Decoding | None = None
    ) -> None:
        """Ask restricted prompts in another way until the tamper is taken back.

        Raises:
            DurometerError: outside ``restored()``.
        """
        before = (self.restricted_chat, self.decoding)

        def back() -> None:
            self.restricted_chat, self.decoding = before

        self.restoration.on_exit(back)
        self.restricted_chat = chat or self.restricted_chat
        self.decoding = decoding or self.decoding

    @contextmanager
    def lent(self, *, host: bool | None = None) -> Iterator["Subject"]:
        """Like ``restored``, for a model in training: checked against its weights as they are now.

        Args:
            host: keep the copies of changed weights in the host's memory; None: where the model is
                on an accelerator, which then holds no second copy.

        Raises:
            RestoreError: the weights are not what they were.
        """
        if host is None:
            host = self.forward.device.type != "cpu"
        before, outer = weights_checksum(self.model), self._restoration
        self._restoration = Restoration(self.model, host=host)
        try:
            yield self
        finally:
            restoration, self._restoration = self._restoration, outer
            restoration.restore()
            if weights_checksum(self.model) != before:
                raise RestoreError(f"subject '{self.name}': an inner attack was not undone exactly")

    @contextmanager
    def restored(self) -> Iterator["Subject"]:
        """Undo on exit whatever is done to the subject inside, and check it bit for bit.

        Raises:
            RestoreError: the weights' fingerprint differs afterwards, so that nothing measured
                later could be trusted.
        """
        before = self.fingerprint
        self._restoration = Restoration(self.model)
        try:
            yield self
        finally:
            restoration, self._restoration = self._restoration, None
            restoration.restore()
            if weights_fingerprint(self.model) != before:
                raise RestoreError(
                    f"subject '{self.name}' was not restored: a tamper changed weights that it "
                    "did not announce"
                )
