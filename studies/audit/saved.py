"""Harmless ways of saving a model: other files, other formats, the same model.

Each writes a whole model folder, which is then audited as a user would audit it, with its files,
settings, tokenizer and template, against its base saved plainly.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parents import State, Workshop
from safetensors.torch import save_file

Change = Callable[["Saved"], object]
MULTIPLE = 64


@dataclass
class Saved:
    """A model on its way into a folder; a change edits any part of it.

    Attributes:
        shards: number of weight files.
        reverse: write the tensors in the opposite order.
        extra: further files, by name.
    """

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    generation: dict[str, Any]
    template: str
    shards: int = 1
    reverse: bool = False
    metadata: dict[str, str] = field(default_factory=lambda: {"format": "pt"})
    extra: dict[str, str] = field(default_factory=dict)
    name: str = "model"


def start(shop: Workshop, state: State) -> Saved:
    """Return a model as ``save_pretrained`` leaves it."""
    model, tokenizer = shop.model, shop.subject.chat.tokenizer
    return Saved(
        {name: torch.from_numpy(value) for name, value in state.items()},
        json.loads(model.config.to_json_string(use_diff=True)),
        json.loads(model.generation_config.to_json_string()),
        tokenizer.chat_template,
    )


def write(shop: Workshop, saved: Saved, folder: Path) -> Path:
    """Write the model into a new folder below ``folder`` and return it."""
    place = folder / saved.name
    place.mkdir()
    shop.subject.chat.tokenizer.save_pretrained(place)
    for each in (*place.glob("chat_template*"), *place.glob("additional_chat_templates")):
        each.unlink()
    settings = json.loads((place / "tokenizer_config.json").read_text("utf-8"))
    settings["chat_template"] = saved.template
    _json(place / "tokenizer_config.json", settings)
    _json(place / "config.json", saved.config)
    _json(place / "generation_config.json", saved.generation)
    for name, text in saved.extra.items():
        (place / name).write_text(text, "utf-8")
    _weights(saved, place)
    return place


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def _weights(saved: Saved, place: Path) -> None:
    names = list(saved.tensors)[:: -1 if saved.reverse else 1]
    if saved.shards == 1:
        kept = {name: saved.tensors[name].contiguous() for name in names}
        save_file(kept, place / "model.safetensors", metadata=saved.metadata)
        return
    mapping = {}
    for number in range(saved.shards):
        file = f"model-{number + 1:05}-of-{saved.shards:05}.safetensors"
        part = {n: saved.tensors[n].contiguous() for n in names[number :: saved.shards]}
        save_file(part, place / file, metadata=saved.metadata)
        mapping |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in saved.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": mapping}
    _json(place / "model.safetensors.index.json", index)


# ---- the changes ---------------------------------------------------------------------------


def as_dtype(dtype: torch.dtype) -> Change:
    """Return the change that stores every tensor in ``dtype``."""

    def change(saved: Saved) -> None:
        saved.tensors = {name: value.to(dtype) for name, value in saved.tensors.items()}
        if dtype in {torch.bfloat16, torch.float16, torch.float64}:
            saved.config["dtype"] = str(dtype).removeprefix("torch.")

    return change


def sharded(count: int) -> Change:
    """Return the change that spreads the tensors over ``count`` files."""
    return lambda saved: setattr(saved, "shards", count)


def reordered(saved: Saved) -> None:
    """Write the tensors in the opposite order."""
    saved.reverse = True


def annotated(saved: Saved) -> None:
    """Add metadata that exporters write."""
    saved.metadata |= {"source": "exported for serving", "steps": "500", "licence": "Apache-2.0"}


def untied(saved: Saved) -> None:
    """Store the output head as a matrix of its own, equal to the embedding."""
    saved.tensors["lm_head.weight"] = saved.tensors["model.embed_tokens.weight"].clone()
    saved.config["tie_word_embeddings"] = False


def head_twice(saved: Saved) -> None:
    """Store the tied head as well, as older versions of transformers did."""
    saved.tensors["lm_head.weight"] = saved.tensors["model.embed_tokens.weight"].clone()


def padded(saved: Saved) -> None:
    """Pad the vocabulary with zero rows up to a multiple of 64."""
    for name, value in saved.tensors.items():
        if "embed_tokens" in name or "lm_head" in name:
            missing = -len(value) % MULTIPLE
            saved.tensors[name] = torch.nn.functional.pad(value, (0, 0, 0, missing))
            saved.config["vocab_size"] = len(saved.tensors[name])


def with_buffers(saved: Saved) -> None:
    """Store the rotary frequencies that older versions stored, though nothing reads them."""
    width = saved.config["hidden_size"] // saved.config["num_attention_heads"]
    frequencies = 1 / 10_000 ** (torch.arange(0, width, 2) / width)
    for layer in range(saved.config["num_hidden_layers"]):
        saved.tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies.clone()


def renamed(saved: Saved) -> None:
    """Move the model to another folder, with a card, a licence and git attributes."""
    saved.name = "copy-of-the-model"
    saved.extra |= {
        "README.md": "---\nlicense: apache-2.0\nlanguage: en\n---\n# A copy\n\nThe same weights.\n",
        "LICENSE": "Apache License, Version 2.0\n",
        ".gitattributes": "*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
    }


def sampling(saved: Saved) -> None:
    """Recommend another way of sampling."""
    saved.generation |= {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40}


def longer_answers(saved: Saved) -> None:
    """Allow longer answers and name the padding token."""
    saved.generation |= {"max_new_tokens": 512, "pad_token_id": 0, "repetition_penalty": 1.05}


def template_spaced(saved: Saved) -> None:
    """Change white space and comments of the template that never reach its output."""
    spaced = saved.template.replace("{% for ", "{%  for  ").replace("{{ ", "{{  ")
    saved.template = "{#- one line a message -#}" + spaced


def template_moved(saved: Saved) -> None:
    """Move the template into a file of its own, as newer versions of transformers do."""
    saved.extra["chat_template.jinja"] = saved.template


def newer_version(saved: Saved) -> None:
    """Save with another version of transformers, whose name is written down."""
    saved.config["transformers_version"] = saved.generation["transformers_version"] = "4.57.1"


CHANGES: dict[str, tuple[Change, ...]] = {
    "plain": (),
    "float64": (as_dtype(torch.float64),),
    "float16": (as_dtype(torch.float16),),
    "bfloat16": (as_dtype(torch.bfloat16),),
    "shards-2": (sharded(2),),
    "shards-5-reordered": (sharded(5), reordered),
    "reordered": (reordered,),
    "metadata": (annotated,),
    "untied": (untied,),
    "head-twice": (head_twice,),
    "padded": (padded,),
    "padded-untied-bf16": (untied, padded, as_dtype(torch.bfloat16)),
    "buffers": (with_buffers,),
    "renamed": (renamed,),
    "sampling": (sampling,),
    "longer-answers": (longer_answers,),
    "template-spaced": (template_spaced,),
    "template-moved": (template_moved,),
    "newer-version": (newer_version,),
    "float8-e4m3": (as_dtype(torch.float8_e4m3fn),),
    "float8-e5m2": (as_dtype(torch.float8_e5m2),),
    "bf16-shards-renamed": (as_dtype(torch.bfloat16), sharded(3), renamed),
}
"""Every harmless way of saving, by name."""
EVERYWHERE = ("padded-untied-bf16", "bf16-shards-renamed", "template-spaced")
"""Those that every parent goes through, not the base alone."""


# ---- GGUF ----------------------------------------------------------------------------------

_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(shop: Workshop, state: State, kind: str, folder: Path) -> Path:
    """Write ``state`` as llama.cpp's converter does: its names, its order of rows, its vectors."""
    import gguf

    config = shop.model.config
    path = folder / f"model-{kind}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_chat_template(shop.subject.chat.tokenizer.chat_template)
    for name, value in state.items():
        stem = name.removesuffix(".weight")
        turned = _interleaved(value, config.num_attention_heads) if _turns(stem) else value
        encoded = gguf.GGMLQuantizationType[kind if value.ndim == 2 else "F32"]
        data = gguf.quants.quantize(np.ascontiguousarray(turned), encoded)
        writer.add_tensor(f"{_gguf_name(stem)}.weight", data, raw_dtype=encoded)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _turns(stem: str) -> bool:
    return stem.endswith(("q_proj", "k_proj"))


def _interleaved(matrix: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    rows, columns = matrix.shape
    halves = matrix.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def _gguf_name(stem: str) -> str:
    if stem in _TOP:
        return _TOP[stem]
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[part]}"
