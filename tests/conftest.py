"""What all tests share: tiny random models, no network, one thread, a temporary cache folder."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
VOCABULARY = 101
SPECIAL = ("<pad>", "<unk>", "<user>", "<assistant>", "<end>")
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}{{ '<end> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # transformers' 0.02 gives nearly uniform predictions at this width
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 4,
}
MakeModel = Callable[..., Any]


@pytest.fixture(scope="session", autouse=True)
def _session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # what one process makes, the others need not make again
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DUROMETER_CACHE", str(folder / "durometer-cache"))
        yield


def make_tiny_model(architecture: str = "Llama", *, seed: int = 0, **changes: Any) -> Any:
    """Return a random fp32 model of an architecture, two layers and small."""
    import transformers

    text = "Text" if hasattr(transformers, f"{architecture}TextConfig") else ""
    config = getattr(transformers, f"{architecture}{text}Config")(**{**TINY, **changes})
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    torch.random.set_rng_state(state)
    return model


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """``make_model("Llama", seed=0, **config)``: see ``make_tiny_model``."""
    return make_tiny_model


@pytest.fixture
def tiny_llama(make_model: MakeModel) -> Any:
    """A fresh two-layer Llama in fp32, always with the same random weights."""
    return make_model("Llama")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """One token a word (``w0`` to ``w95``), with the chat template of ``TEMPLATE``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = (*SPECIAL, *(f"w{index}" for index in range(VOCABULARY - len(SPECIAL))))
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[2:4])})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def padded() -> Callable[[Sequence[Any]], dict[str, torch.Tensor]]:
    """Rows as transformers wants a batch: ids, mask, and labels with -100 where none counts."""

    def batch(rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        length = max(len(row.ids) for row in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for index, row in enumerate(rows):
            tokens = torch.tensor(row.ids)
            ids[index, : len(tokens)], mask[index, : len(tokens)] = tokens, 1
            labels[index, row.first_label : len(tokens)] = tokens[row.first_label :]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return batch
