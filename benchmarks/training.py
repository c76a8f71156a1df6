"""LoRA attack steps on ``smollm2``: ours against transformers.Trainer with PEFT, the same job.

Same rows in the same order, same adapter initialisation, AdamW at a constant rate, bf16 weights
with fp32 adapters, batch 8. Losses are compared as well: a faster loop that computes something
else is not faster.
"""

import itertools
import tempfile
import time
from typing import Any

import torch
from common import alternate, ratio, write
from torch.utils.data import DataLoader, SequentialSampler

import durometer
from durometer.core.budget import Budget
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.tampers.base import make_tamper

STEPS, ROUNDS, SETTINGS = 8, 5, {"learning_rate": 3e-4, "examples": 64}
SEEDS = Seeds.derive(1)


def our_losses(subject: Subject, domain: Domain, seconds: list[float]) -> list[float]:
    """Run the attack as a campaign does and return its losses."""
    tamper = make_tamper("lora", **SETTINGS)
    losses = []
    with subject.restored():
        begun = time.perf_counter()
        for update in tamper.steps(subject, domain, Budget(STEPS), SEEDS):
            losses.append(update.loss)
        seconds.append(time.perf_counter() - begun)
    return losses


def batches(subject: Subject, domain: Domain) -> list[list[Row]]:
    """Return the batches of the attack, for the other loop."""
    tamper: Any = make_tamper("lora", **SETTINGS)
    return list(itertools.islice(tamper.batches(subject, domain, SEEDS), STEPS))


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad a batch to its longest row, as transformers' collators do."""
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 2, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])
        for name, value in fill.items()
    }


def trainer_losses(
    subject: Subject, rows: list[Row], adapter: dict[str, torch.Tensor], seconds: list[float]
) -> list[float]:
    """Run the same job by ``transformers.Trainer`` with PEFT and return its losses."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    from durometer.core.adapters import linear_maps

    data = [
        {
            "input_ids": list(row.ids),
            "attention_mask": [1] * len(row.ids),
            "labels": [-100] * row.first_label + list(row.labels),
        }
        for row in rows
    ]
    names = linear_maps(subject.model, "all")
    config = LoraConfig(r=16, lora_alpha=32, target_modules=names, task_type="CAUSAL_LM")
    model = get_peft_model(subject.model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                key = name.removeprefix("base_model.model.").replace(".default.", ".durometer.")
                parameter.copy_(adapter[key])

    class Sequential(Trainer):
        """The stock trainer, with rows in the given order so that losses can be compared."""

        def get_train_dataloader(self) -> DataLoader[Any]:
            sampler = SequentialSampler(data)
            return DataLoader(data, batch_size=8, sampler=sampler, collate_fn=collate)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=8,
            learning_rate=SETTINGS["learning_rate"],
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            weight_decay=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=subject.forward.device.type == "cpu",
        )
        trainer = Sequential(model, arguments, train_dataset=data)
        begun = time.perf_counter()
        trainer.train()
        seconds.append(time.perf_counter() - begun)
    model.unload()
    subject.model.requires_grad_(False)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def first_adapter(subject: Subject) -> dict[str, torch.Tensor]:
    """Return the adapter matrices with which our attack begins."""
    tamper: Any = make_tamper("lora", **SETTINGS)
    with subject.restored():
        tamper.prepare(subject, SEEDS)
        matrices = tamper._adapter.matrices()
        return {name: p.detach().clone() for name, p in matrices.items() if "lora_A" in name}


def main() -> None:
    """Run both loops in turn and write ``results/training.json``."""
    subject = durometer.load_subject("smollm2-refusal")
    domain = durometer.load_domain("capitals")
    rows = [row for batch in batches(subject, domain) for row in batch]
    adapter = first_adapter(subject)
    theirs: list[float] = []
    ours: list[float] = []
    losses: dict[str, list[float]] = {}

    def run_ours() -> None:
        losses["ours"] = our_losses(subject, domain, ours)

    def run_theirs() -> None:
        losses["trainer"] = trainer_losses(subject, rows, adapter, theirs)

    alternate(run_theirs, run_ours, ROUNDS + 1)
    # The first round of each warms up caches of kernels and is not counted.
    difference = max(abs(a - b) for a, b in zip(losses["ours"], losses["trainer"], strict=True))
    path = write(
        "training",
        {
            "what": "8 LoRA steps (batch 8, rank 16) on smollm2-refusal, capitals",
            "baseline": "transformers.Trainer + PEFT",
            **ratio(theirs[1:], ours[1:]),
            "examples_per_second": 64 * len(ours[1:]) / sum(ours[1:]),
            "losses": losses,
            "largest_loss_difference": difference,
            "dtype": subject.dtype,
        },
    )
    print(path.read_text())


if __name__ == "__main__":
    main()
