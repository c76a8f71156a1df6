"""What a tensor is for, by its name: Hugging Face and GGUF conventions."""

import re
from dataclasses import dataclass
from typing import Literal

Role = Literal[
    "embedding", "head", "query", "key", "value", "output", "gate", "up", "down", "norm", "other"
]

# The last part of a name that says it all; `c_proj` and `dense` depend on what they sit in.
_ROLES: dict[Role, tuple[str, ...]] = {
    "embedding": ("embed_tokens", "wte", "tok_embeddings", "token_embd", "embed_in"),
    "head": ("lm_head", "embed_out", "output"),
    "query": ("q_proj", "wq", "attn_q", "qkv_proj", "c_attn", "query_key_value", "attn_qkv"),
    "key": ("k_proj", "wk", "attn_k"),
    "value": ("v_proj", "wv", "attn_v"),
    "output": ("o_proj", "out_proj", "wo", "attn_output", "dense"),
    "gate": ("gate_proj", "w1", "ffn_gate", "ffn_gate_exps", "gate_up_proj"),
    "up": ("up_proj", "w3", "ffn_up", "ffn_up_exps", "c_fc", "fc1", "dense_h_to_4h"),
    "down": ("down_proj", "w2", "ffn_down", "ffn_down_exps", "fc2", "dense_4h_to_h"),
}
_BY_NAME = {name: role for role, names in _ROLES.items() for name in names}
_LAYER = re.compile(r"(?:layers|blk|h|blocks|block)\.(\d+)\.")
_EXPERT = re.compile(r"experts\.(\d+)\.")
_GGUF = re.compile(r"^(blk\.\d+\.|token_embd\.|output\.|output_norm\.)")

WRITERS: frozenset[Role] = frozenset({"embedding", "output", "down"})
"""Roles whose products are added to the residual stream."""
READERS: frozenset[Role] = frozenset({"query", "key", "value", "gate", "up", "head"})
"""Roles that read the residual stream."""


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in its model.

    Attributes:
        layer: number of the block, None outside of blocks.
        expert: number of the expert, None where there is none.
        part: ``weight`` or ``bias``.
        detail: tells apart tensors of the same role, such as the norms of one block.
    """

    role: Role
    layer: int | None = None
    expert: int | None = None
    part: str = "weight"
    detail: str = ""


# The norms of llama-type blocks under both conventions.
_NORMS = {
    "input_layernorm": "before_attention",
    "attn_norm": "before_attention",
    "post_attention_layernorm": "before_mlp",
    "ffn_norm": "before_mlp",
    "norm": "last",
    "output_norm": "last",
}


def place_of(name: str) -> Place:
    """Return the place that the tensor ``name`` has; role ``other`` if it is not known."""
    stem, _, part = name.rpartition(".")
    if part not in {"weight", "bias"}:
        stem, part = name, "weight"
    last = stem.rpartition(".")[2]
    layer, expert = (
        int(found[1]) if (found := pattern.search(name)) else None for pattern in (_LAYER, _EXPERT)
    )
    if last == "c_proj":
        role: Role = "down" if ".mlp." in name else "output"
    elif "norm" in last or last.startswith("ln_"):
        return Place("norm", layer, expert, part, _NORMS.get(last, last))
    else:
        role = _BY_NAME.get(last, "other")
    return Place(role, layer, expert, part, stem if role == "other" else "")


def is_gguf(names: list[str]) -> bool:
    """Say whether tensors are named as in GGUF files."""
    return any(_GGUF.match(name) for name in names)


def shared_names(subject: list[str], base: list[str]) -> dict[str, str]:
    """Return the base's name of each tensor of the subject, same names first, then same places.

    A place that two tensors of one side claim is left out. An output head of its own belongs to the
    base's embedding if the base is tied, having none.
    """
    known = set(base)
    pairs = {name: name for name in subject if name in known}
    left: dict[Place, list[str]] = {}
    for name in known - set(pairs):
        left.setdefault(place_of(name), []).append(name)
    for name in subject:
        there = left.get(place_of(name), [])
        if name not in pairs and len(there) == 1:
            pairs[name] = there[0]
    own, tied = _matrices(subject, "head"), _matrices(base, "embedding")
    if len(own) == len(tied) == 1 and not _matrices(base, "head"):
        pairs.setdefault(own[0], tied[0])
    return pairs


def _matrices(names: list[str], role: Role) -> list[str]:
    return [name for name in names if place_of(name) == Place(role)]
