"""What a model is, as a hash: of its tensors, and of everything else that shapes its answers."""

import hashlib

import torch
from torch import nn

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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


def weights_checksum(model: nn.Module) -> list[int]:
    """Return two numbers a tensor, computed where it lies: quick, for checks while training.

    The xor of all words shows any change of one element, a sum weighted by place most exchanges.
    It is no fingerprint: somebody could build another tensor with the same numbers.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return [int(n) for n in torch.stack([_checksum(t.detach()) for t in tensors]).flatten()]


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    words = tensor.contiguous().reshape(-1).view(_WORDS[tensor.element_size()])
    columns = words[: words.numel() // 64 * 64].reshape(-1, 64).sum(0, dtype=torch.int64)
    weights = torch.arange(1, 65, device=words.device, dtype=torch.int64)
    return torch.stack([torch.hash_tensor(words).view(torch.int64), (columns * weights).sum()])


def text_fingerprint(*parts: str) -> str:
    """Return the SHA-256 over texts: fingerprint, tokenizer, template, generation settings."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part.encode())
    return digest.hexdigest()
