"""nanoGCG's own search, run in an environment that has the package; see ``gcg.py``.

Reads one JSON object from standard input and prints one as the last line of standard output. Needs
``nanogcg`` and a transformers of 4.43 to 4.47, which takes the keys and values that nanoGCG passes.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nanogcg
import torch
from nanogcg import gcg
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

BEGINNINGS: list[float] = []
PROCESSOR: list[float] = []
WIDTHS: list[int] = []


def watch() -> None:
    """Note when each step begins and how many candidates it scores."""
    gradient, kept = gcg.GCG.compute_token_gradient, gcg.filter_ids

    def timed(self: Any, *given: Any) -> Any:
        BEGINNINGS.append(time.perf_counter())
        PROCESSOR.append(time.process_time())
        return gradient(self, *given)

    def counted(*given: Any) -> Any:
        ids = kept(*given)
        WIDTHS.append(len(ids))
        return ids

    gcg.GCG.compute_token_gradient, gcg.filter_ids = timed, counted


def keep_prefix(model: Any) -> None:
    """Return keys and values as tuples: a cache object would grow with every gradient."""
    forward = model.forward

    def plain(*given: Any, **named: Any) -> Any:
        output = forward(*given, **named)
        if hasattr(output.past_key_values, "to_legacy_cache"):
            output.past_key_values = output.past_key_values.to_legacy_cache()
        return output

    model.forward = plain


def main() -> None:
    asked = json.load(sys.stdin)
    # The class that the folder names, and a template in a file of its own, are newer.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(asked["folder"])
    tokenizer.chat_template = (Path(asked["folder"]) / "chat_template.jinja").read_text()
    model = AutoModelForCausalLM.from_pretrained(asked["folder"], torch_dtype=torch.float32).eval()
    keep_prefix(model)
    watch()
    config = nanogcg.GCGConfig(
        num_steps=asked["steps"],
        search_width=asked["candidates"],
        topk=asked["top_k"],
        optim_str_init=asked["initial"],
        batch_size=asked["batch"],
        seed=1,
        verbosity="WARNING",
    )
    result = nanogcg.run(model, tokenizer, asked["prompt"], asked["target"], config)
    processor = time.process_time() - PROCESSOR[0]
    seconds = [at - BEGINNINGS[0] for at in (*BEGINNINGS[1:], time.perf_counter())]
    answer = {
        "candidates_per_second": sum(WIDTHS) / seconds[-1],
        "candidates_per_processor_second": sum(WIDTHS) / processor,
        "candidates": WIDTHS,
        "seconds_and_loss": list(zip(seconds, map(float, result.losses), strict=True)),
        "suffix_tokens": len(tokenizer(asked["initial"], add_special_tokens=False)["input_ids"]),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("nanogcg", "torch", "transformers")},
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
