"""What a model is, as a hash: of its tensors, and of everything else that shapes its answers."""

import hashlib

import torch
from torch import nn


def _update(digest: "hashlib._Hash", name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)


def weights_fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of all tensors, sorted by name.

    Tied tensors are counted once, under the first of their names.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _update(digest, name, tensors[name])
    return digest.hexdigest()


def text_fingerprint(*parts: str) -> str:
    """Return the SHA-256 over texts: fingerprint, tokenizer, template, generation settings."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part.encode())
    return digest.hexdigest()
