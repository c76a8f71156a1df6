"""What the study hardens, and with which settings."""

from dataclasses import dataclass

SUBJECT, DOMAIN = "smollm2", "capitals"
KINDS = ("knowledge", "refusal")
SEED = 7


@dataclass(frozen=True)
class Entry:
    """One hardened model of the study.

    Attributes:
        kind: of the domain: ``knowledge`` or ``refusal``.
        name: of the safeguard.
        settings: of the safeguard, as the command line has them.
        role: ``safeguard``, ``control``, or ``reference`` (the plain safeguard of its kind).
        dtype: number format of the training; every attack computes in that of the study.
        attacked: whether it has a run of its own; a reference is attacked in the others' runs.
    """

    kind: str
    name: str
    settings: str = "preset=light"
    role: str = "safeguard"
    dtype: str = "auto"
    attacked: bool = True

    @property
    def folder(self) -> str:
        """Name of its folder in the work folder."""
        return f"{self.kind}-{self.name}"

    @property
    def safeguard(self) -> str:
        """What ``durometer harden --safeguard`` is given."""
        return f"{self.name}:{self.settings}"


# Without a preset for this size: plain fine-tuning takes steps and rate of the refusal safeguard,
# circuit breakers and the edit their defaults, which are those published for larger models. Edits
# of all weights at once, and replayed attacks, need more than bfloat16 resolves.
SFT = "steps=40,learning_rate=1e-3,schedule=linear,warmup_steps=4,batch_size=8,train=adapter"
EDIT = "directions_of=retain,measured_rows=64"
ENTRIES = (
    Entry("knowledge", "random_mapping", role="reference", dtype="float32", attacked=False),
    Entry("knowledge", "rmu"),
    Entry("knowledge", "rep_select", EDIT, dtype="float32"),
    Entry("knowledge", "tar", dtype="float32"),
    Entry("knowledge", "plain_sft", SFT, role="control"),
    Entry("refusal", "refusal", role="reference", attacked=False),
    Entry("refusal", "circuit_breakers", "batch_size=8"),
    Entry("refusal", "tar", dtype="float32"),
)


def chosen(only: str, entries: tuple[Entry, ...] = ENTRIES) -> list[Entry]:
    """Return the entries named with commas between (``tar`` or ``knowledge-tar``); '' is all.

    The plain safeguard of a kind is there whenever another of its kind is compared with it.

    Raises:
        ValueError: an unknown name.
    """
    names = {name.strip() for name in only.split(",") if name.strip()}
    known = {name for entry in entries for name in (entry.name, entry.folder)}
    if names - known:
        raise ValueError(f"--only {', '.join(sorted(names - known))}: not one of {sorted(known)}")
    wanted = [e for e in entries if not names or {e.name, e.folder} & names]
    kinds = {entry.kind for entry in wanted}
    return [e for e in entries if e in wanted or (e.role == "reference" and e.kind in kinds)]


def reference_of(entry: Entry, entries: tuple[Entry, ...] = ENTRIES) -> Entry | None:
    """Return the plain safeguard that an entry is compared with, None for itself."""
    plain = [e for e in entries if e.kind == entry.kind and e.role == "reference"]
    return None if entry in plain or not plain else plain[0]
