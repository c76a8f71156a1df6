"""A universal soft prompt: vectors in place of tokens, trained with gradients."""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from durometer.core.budget import Budget, Spent, matrix_entries, training_flops
from durometer.core.errors import NotApplicableError
from durometer.core.optimizers import make_optimizer
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.core.settings import Between, Levels, Settings, setting
from durometer.core.training import DivergedError, Update
from durometer.domains.base import Domain, Item, Role
from durometer.subjects.base import Subject
from durometer.subjects.chat import ChatFormat
from durometer.tampers.base import Access, Checkpoint, OnCheckpoint, Realised, Tamper, tamper
from durometer.tampers.data import make_rows, order_hash, shuffled_batches, training_items

# Vocabulary entries tried as a placeholder, added tokens first, then the rarest ones.
CANDIDATES = 256


# Updates in each of the two means that tell whether the loss fell.
LEAST_QUARTER = 2


class SoftPromptSettings(Settings):
    """Size, start and training of the soft prompt."""

    vectors: int = setting(
        20, "vectors after the user's prompt", search=Levels((1, 2, 4, 8, 16, 20, 32)), ge=1, le=512
    )
    steps: int = setting(100, "planned updates", search=Levels((16, 64, 100, 500)), ge=1)
    learning_rate: float = setting(
        0.05,
        "step size, in root mean squares of the embeddings' entries",
        search=Between(1e-3, 0.5, log=True),
        gt=0,
    )
    optimizer: Literal["sign_sgd", "adam"] = setting(
        "sign_sgd", "optimiser", search=Levels(("sign_sgd", "adam"))
    )
    target: Literal["restricted", "random"] = setting(
        "restricted",
        "what the vectors are trained to bring out: restricted answers, or, as a control, random "
        "tokens of equal number",
    )
    start: Literal["words", "mean"] = setting(
        "words",
        "first vectors: embeddings of tokens drawn at random, or the vocabulary's mean",
        search=Levels(("words", "mean")),
    )
    norm_limit: float = setting(
        0.0, "longest vector, in mean embedding norms; 0 limits nothing", ge=0
    )
    batch_size: int = setting(8, "rows an update", search=Levels((4, 8, 16)), ge=1)
    examples: int = setting(64, "unique training examples", search=Levels((1, 10, 64, 100)), ge=1)
    max_length: int = setting(512, "longest row in tokens", ge=8)


@dataclass(frozen=True)
class Placeholder:
    """Text that stands where the vectors go, and the one token it consists of."""

    text: str
    token: int


def find_placeholder(chat: ChatFormat, items: Sequence[Item], count: int) -> Placeholder:
    """Return a suffix that encodes to exactly ``count`` equal tokens in all restricted prompts.

    The token comes up in no prompt or response of the ``items``, is none with which the tokenizer
    itself works (BOS, EOS, padding, unknown) and is not the last of the prompt's ids, so that no
    cache of shared beginnings is cut inside the run.

    Raises:
        NotApplicableError: no such token among the candidates.
    """
    used = {token for item in items for token in chat.prompt_ids(item.prompt, item.response)}
    prompts = dict.fromkeys(item.prompt for item in items if item.role == Role.RESTRICTED)
    for token in itertools.islice(_candidates(chat.tokenizer, used), CANDIDATES):
        text = chat.tokenizer.decode([token])
        for joined in (text * count, " " + " ".join([text.strip()] * count)):
            asked = replace(chat, suffix=chat.suffix + joined)
            if text.strip() and all(
                _is_run(asked.prompt_ids(prompt), token, count) for prompt in prompts
            ):
                return Placeholder(joined, token)
    raise NotApplicableError(f"no token found that can stand {count} times for a soft prompt")


def _candidates(tokenizer: Any, used: set[int]) -> Iterator[int]:
    working = ("bos", "eos", "pad", "unk")
    # 0 fills padded batches; those positions are masked, but nothing should be put there either.
    barred = {0, *used, *(getattr(tokenizer, f"{name}_token_id", None) for name in working)}
    added = sorted(getattr(tokenizer, "added_tokens_decoder", {}), reverse=True)
    for token in dict.fromkeys((*added, *range(len(tokenizer) - 1, 0, -1))):
        if token not in barred:
            yield token


def _is_run(ids: Sequence[int], token: int, count: int) -> bool:
    """Say whether ``token`` comes ``count`` times, in one run that is not at the end."""
    if ids.count(token) != count or ids[-1] == token:
        return False
    first = ids.index(token)
    return set(ids[first : first + count]) == {token}


class SoftPromptHook:
    """Replaces each complete run of a placeholder by the vectors, after the embedding table.

    Runs of another length, and all other tokens, are left as they are. It does not matter where in
    a row, a left-padded batch, a tree of rows or behind a cache the run lies.

    Args:
        vectors: shape [count, width], fp32.
        token: the placeholder.
    """

    def __init__(self, vectors: torch.Tensor, token: int) -> None:
        self.vectors = vectors
        self._token = token

    def __call__(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """Return the embeddings ``output`` [rows, length, width] with the runs replaced."""
        found = inputs[0] == self._token
        if not found.any():
            return output
        places = torch.arange(found.shape[1], device=found.device).expand_as(found)
        before = places.masked_fill(found, -1).cummax(1).values
        behind = places.masked_fill(found, found.shape[1]).flip(1).cummin(1).values.flip(1)
        whole = found & (behind - before - 1 == len(self.vectors))
        rows = self.vectors[(places - before - 1)[whole]].to(output)
        return output.masked_scatter(whole[..., None], rows)


@tamper("soft_prompt", aliases=("soft-prompt",))
class SoftPrompt(Tamper[SoftPromptSettings]):
    """Train one soft prompt on all examples and ask every restricted prompt with it.

    The vectors stand behind the user's prompt, in place of a token that the vocabulary has but the
    domain never uses. A few vectors can force any string, so that success counts only against the
    control ``target=random`` and against facts that were never taught.
    """

    summary = "train vectors behind the prompt, the same for all prompts, with gradients"
    access: ClassVar[Access] = "activations"
    access_level = "A3"
    cost = "4 N T"
    source = "arXiv 2402.09063, 2502.15836"
    cannot_show = "that the subject knows what the vectors may have carried into it"
    settings_class = SoftPromptSettings
    matched_control = ("target", "random")
    _placeholder: Placeholder | None = None
    _hook: SoftPromptHook | None = None
    _limit: float = 0.0

    def planned_steps(self) -> int:
        """Return the updates that the settings plan."""
        return self.settings.steps

    def install(
        self, subject: Subject, data: Domain, seeds: Seeds
    ) -> tuple[SoftPromptHook, list[Row], float]:
        """Hook the untrained vectors in; return the hook, the rows and the embeddings' RMS.

        Raises:
            NotApplicableError: no token of the vocabulary can stand for the vectors.
        """
        settings = self.settings
        place = find_placeholder(subject.chat, data.items, settings.vectors)
        _ = subject.tree  # tried on the model as it is, before anything is hooked
        chat = replace(subject.chat, suffix=subject.chat.suffix + place.text)
        chosen = training_items(data, "disjoint", settings.examples, seeds)
        rows = make_rows(chosen, chat, label_prompt=False, max_length=settings.max_length)
        embedding = subject.model.get_input_embeddings()
        table = _embeddings(embedding, subject.forward.device, len(chat.tokenizer))
        generator = torch.Generator().manual_seed(seeds.initialisation)
        if settings.start == "words":
            drawn = torch.randint(len(table), (settings.vectors,), generator=generator)
            start = table[drawn.to(table.device)].clone()
        else:
            start = table.mean(0).repeat(settings.vectors, 1)
        if settings.target == "random":
            rows = random_targets(rows, len(chat.tokenizer), seeds)
        self._limit = float(table.norm(dim=1).mean()) * settings.norm_limit
        hook = SoftPromptHook(nn.Parameter(start), place.token)
        handle = embedding.register_forward_hook(hook)
        subject.restoration.on_exit(handle.remove)
        subject.ask_restricted(chat=chat)
        self._placeholder = place
        return hook, rows, float(table.pow(2).mean().sqrt())

    def steps(
        self, subject: Subject, data: Domain, budget: Budget, seeds: Seeds
    ) -> Iterator[Update]:
        """Yield after each update; the vectors are in place and may be measured in between.

        Raises:
            DivergedError: the loss or its gradient is not finite; the last vectors are kept.
        """
        settings = self.settings
        planned = min(budget.steps, settings.steps)
        if not planned:
            return
        hook, rows, scale = self.install(subject, data, seeds)
        self._hook = hook
        vectors: Any = hook.vectors
        rate = settings.learning_rate * scale
        optimizer = make_optimizer(settings.optimizer, [vectors], rate, 0.0)
        batches = shuffled_batches(rows, (), settings.batch_size, 0.0, seeds)
        for step, batch in enumerate(itertools.islice(batches, planned), start=1):
            optimizer.zero_grad()
            loss = batch_gradients(subject, batch)
            if not (math.isfinite(loss) and torch.isfinite(vectors.grad).all()):
                raise DivergedError(f"loss {loss:g} at a soft prompt")
            optimizer.step()
            self._project(vectors)
            yield Update(
                step,
                loss,
                rate,
                sum(len(row.ids) for row in batch),
                sum(len(row.labels) for row in batch),
                tuple(row.item_id for row in batch),
                sum(row.restricted for row in batch),
            )

    @torch.no_grad()
    def _project(self, vectors: torch.Tensor) -> None:
        if self._limit:
            norms = vectors.norm(dim=1, keepdim=True)
            vectors.mul_((self._limit / norms.clamp_min(1e-12)).clamp(max=1.0))

    def run(
        self,
        subject: Subject,
        data: Domain,
        budget: Budget,
        seeds: Seeds,
        on_checkpoint: OnCheckpoint,
    ) -> Realised:
        """Train along the budget's rungs; see ``Tamper.run``."""
        realised = Realised()
        ledger = _Ledger(subject, realised)
        try:
            for update in self.steps(subject, data, budget, seeds):
                ledger.add(update)
                if self.on_update is not None:
                    self.on_update(update)
                spent = replace(realised.spent)
                stop = update.step in budget.rungs and not on_checkpoint(
                    Checkpoint(update.step, spent)
                )
                ledger.resume()
                if stop:
                    break
        except DivergedError as error:
            realised.status = "diverged"
            realised.reason = f"after {realised.spent.steps} steps: {error}"
        self._report(realised)
        return realised

    def _report(self, realised: Realised) -> None:
        """Record the vectors' size, the placeholder, and whether the loss has fallen at all."""
        flat = [item_id for ids in realised.item_ids for item_id in ids]
        realised.data_order_hash = order_hash(flat[: realised.spent.examples])
        if self._hook is None or self._placeholder is None or not realised.losses:
            realised.status, realised.reason = _unless_diverged(realised, "no update was made")
            return
        vectors = self._hook.vectors.detach()
        realised.facts |= {
            "placeholder_token": self._placeholder.token,
            "vectors": list(vectors.shape),
            "mean_vector_norm": float(vectors.norm(dim=1).mean()),
            "loss_positions": "labels only",
            "target": self.settings.target,
        }
        if not _fell(realised.losses):
            realised.status, realised.reason = _unless_diverged(realised, "the loss did not fall")


def _fell(losses: list[float]) -> bool:
    """Compare the means of the first and the last quarter: single batches differ by chance.

    Too few updates tell nothing, and a trial that broke early must not be dropped for its batches.
    """
    if len(losses) > 1 and max(losses) - min(losses) < 1e-6:
        return False  # nothing moves it at all
    quarter = len(losses) // 4
    return quarter < LEAST_QUARTER or sum(losses[-quarter:]) < sum(losses[:quarter])


def _unless_diverged(realised: Realised, reason: str) -> tuple[str, str]:
    if realised.status == "diverged":
        return realised.status, realised.reason
    return "no_effect", reason


def batch_gradients(subject: Subject, rows: Sequence[Row]) -> float:
    """Add the gradient of the mean loss over the labels of ``rows``; return that loss, nats.

    Gradients go only to what a hook brings in: the model's own weights require none.
    """
    labels, loss = sum(len(row.labels) for row in rows), 0.0
    for part in subject.forward.loss_sums(rows):
        (part / labels).backward()
        loss += float(part.detach()) / labels
    return loss


def random_targets(rows: Sequence[Row], vocabulary: int, seeds: Seeds) -> list[Row]:
    """Return the rows with every label replaced by a random token, drawn by the sampling seed."""
    generator = torch.Generator().manual_seed(seeds.sampling)
    changed = []
    for row in rows:
        drawn = torch.randint(vocabulary, (len(row.labels),), generator=generator).tolist()
        changed.append(Row((*row.ids[: row.first_label], *drawn), row.first_label, row.item_id))
    return changed


@torch.no_grad()
def _embeddings(embedding: Any, device: torch.device, vocabulary: int) -> torch.Tensor:
    """Return what the embedding layer gives for every token (scaled, where it scales), fp32."""
    count = min(vocabulary, int(embedding.num_embeddings))
    output: torch.Tensor = embedding(torch.arange(count, device=device)[None])[0]
    return output.float()


class _Ledger:
    """Adds up what the training spends; measuring time is not counted."""

    def __init__(self, subject: Subject, realised: Realised) -> None:
        self._entries = matrix_entries(subject.model)
        head = subject.model.get_output_embeddings()
        self._head = head.weight.numel() if head is not None else 0
        self._spent: Spent = realised.spent
        self._realised = realised
        self._seen: dict[str, bool] = {}
        self._clock = time.perf_counter()

    def add(self, update: Update) -> None:
        realised, spent = self._realised, self._spent
        self._seen |= dict.fromkeys(update.item_ids, update.restricted > 0)
        realised.learning_rates.append(update.learning_rate)
        realised.losses.append(update.loss)
        realised.item_ids.append(update.item_ids)
        spent.steps = update.step
        spent.examples = len(self._seen)
        spent.restricted_examples = sum(self._seen.values())
        spent.tokens += update.tokens
        spent.flops += training_flops(
            self._entries, update.tokens, self._head, update.labels, full=False
        )
        spent.seconds += time.perf_counter() - self._clock

    def resume(self) -> None:
        self._clock = time.perf_counter()
