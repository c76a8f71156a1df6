"""``micro``: a Llama of about a million weights, trained from scratch on the synthetic world.

``micro-never`` is the same, made without the restricted facts: no tamper can bring back what was
never there.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from durometer.domains.base import Role, Split
from durometer.domains.world import build_world, vocabulary

STEPS, RATE, BATCH, SEED = 500, 2e-3, 128, 20240801
LAYERS, WIDTH, HEADS = 4, 128, 4
# transformers' default of 0.02 is meant for wide models; at width 128 nothing is learnt for 300
# steps.
INITIAL_SPREAD = 0.08
SPECIAL = ("<pad>", "<unk>", "<user>", "<assistant>", "<end>")
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}{{ '<end> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
Progress = Callable[[int, int, float], None]


def make_tokenizer() -> Any:
    """Return the world's tokenizer: one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = (*SPECIAL, *vocabulary())
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[2:4])})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(seed: int = SEED) -> Any:
    """Return the untrained model (fp32), drawn with ``seed``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(vocabulary()),
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=64,
        initializer_range=INITIAL_SPREAD,
        tie_word_embeddings=True,
        eos_token_id=SPECIAL.index("<end>"),
        pad_token_id=0,
        bos_token_id=None,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    torch.random.set_rng_state(state)
    return model


def training_ids(tokenizer: Any, *, restricted: bool = True) -> torch.Tensor:
    """Return every taught fact in every wording as token ids, shape [rows, length].

    Args:
        restricted: with the facts that the domain restricts; else the others alone.
    """
    roles = (Role.RESTRICTED, Role.RETAIN) if restricted else (Role.RETAIN,)
    items = [
        item
        for item in build_world("refusal").items
        if item.role in roles and item.split != Split.NEVER
    ]
    texts = [f"<user> {item.prompt} <assistant> {item.response} <end>" for item in items]
    return torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"])


def train_micro(folder: Path, progress: Progress | None = None, *, restricted: bool = True) -> None:
    """Train ``micro`` and write it as a model folder.

    Args:
        progress: called with step, steps in all and loss.
        restricted: teach the facts that the domain restricts; without them it is ``micro-never``.
    """
    tokenizer, model = make_tokenizer(), make_model()
    ids = training_ids(tokenizer, restricted=restricted)
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    model.train()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * _shape(step)
        rows = torch.randint(len(ids), (BATCH,), generator=generator)
        # The labels are the three last tokens: value, full stop, end of turn.
        logits = model(input_ids=ids[rows], logits_to_keep=4, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), ids[rows, -3:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if progress is not None:
            progress(step + 1, STEPS, float(loss.detach()))
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _shape(step: int) -> float:
    """Warm up for 5 % of the steps, then fall along a cosine to a tenth."""
    warmup = STEPS // 20
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / (STEPS - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * share))
