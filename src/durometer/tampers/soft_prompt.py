"""A soft prompt, for all prompts or for each: vectors in place of tokens, trained by gradient."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from durometer.core.budget import Budget
from durometer.core.errors import NotApplicableError
from durometer.core.optimizers import make_optimizer
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.core.settings import Between, Levels, Settings, setting
from durometer.core.training import DivergedError, Update
from durometer.domains.base import Domain, Item, Role, Split
from durometer.subjects.base import Subject
from durometer.subjects.chat import ChatFormat
from durometer.tampers.base import Access, OnCheckpoint, Realised, Tamper, tamper
from durometer.tampers.data import make_rows, order_hash, shuffled_batches, training_items
from durometer.tampers.ledger import Ledger, along_rungs
from durometer.tampers.prefill import AFFIRMATIVE

# Vocabulary entries tried as a placeholder, added tokens first, then the rarest ones.
CANDIDATES = 256
# Who is measured by restricted prompts.
MEASURED = (Split.SELECT, Split.REPORT, Split.NEVER)
# Updates in each of the two means that tell whether the loss fell.
LEAST_QUARTER = 2


class SoftPromptSettings(Settings):
    """Size, start and training of the soft prompt."""

    vectors: int = setting(
        20, "vectors after the user's prompt", search=Levels((1, 2, 4, 8, 16, 20, 32)), ge=1, le=512
    )
    scope: Literal["universal", "per_item"] = setting(
        "universal",
        "the same vectors behind all prompts, or vectors of its own for each prompt that may be "
        "measured, trained to bring out the opening of a response that holds no answer",
        search=Levels(("universal", "per_item")),
    )
    steps: int = setting(
        100, "planned updates (of all the vectors)", search=Levels((16, 64, 100, 500)), ge=1
    )
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
        "what the vectors are trained to bring out: restricted answers (per_item: openings), or, "
        "as a control, random tokens of equal number",
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
    """Texts that stand where the vectors go: runs of a few tokens that nothing else uses.

    The run of prompt number n writes n with the tokens as digits, the least one first, so that the
    vectors of every prompt are found by the run alone, wherever it lies in a batch.

    Attributes:
        tokens: the digits; one is enough where all prompts have the same vectors.
        texts: what each of them decodes to.
        count: length of a run, one token a vector.
        spaced: whether the texts are joined by single spaces.
    """

    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    count: int
    spaced: bool = False

    def text(self, number: int = 0) -> str:
        """Return the suffix of prompt ``number``."""
        pieces = [self.texts[digit] for digit in self._digits(number)]
        return "".join(f" {piece.strip()}" for piece in pieces) if self.spaced else "".join(pieces)

    def run(self, number: int = 0) -> list[int]:
        """Return the ids of that suffix."""
        return [self.tokens[digit] for digit in self._digits(number)]

    def stands_in(self, chat: ChatFormat, prompt: str, number: int = 0) -> bool:
        """Say whether ``prompt`` encodes to one run, which is not at the end."""
        ids = replace(chat, suffix=chat.suffix + self.text(number)).prompt_ids(prompt)
        places = [place for place, token in enumerate(ids) if token in self.tokens]
        if len(places) != self.count or places[-1] == len(ids) - 1:
            return False
        return list(ids[places[0] : places[0] + self.count]) == self.run(number)

    def _digits(self, number: int) -> list[int]:
        base = len(self.tokens)
        return [number // base**place % base for place in range(self.count)]


def find_placeholder(
    chat: ChatFormat, items: Sequence[Item], count: int, prompts: Sequence[str] = ()
) -> Placeholder:
    """Return suffixes that encode to exactly ``count`` unused tokens in all restricted prompts.

    The tokens come up in no prompt or response of the ``items``, are none with which the tokenizer
    itself works (BOS, EOS, padding, unknown) and never the last of the prompt's ids, so that no
    cache of shared beginnings is cut inside a run.

    Args:
        prompts: those that need runs of their own, numbered as they come; none: one run for all.

    Raises:
        NotApplicableError: not enough such tokens among the candidates.
    """
    base = 1
    while base**count < len(prompts):
        base += 1
    used = {token for item in items for token in chat.prompt_ids(item.prompt, item.response)}
    asked = dict.fromkeys(item.prompt for item in items if item.role == Role.RESTRICTED)
    found: dict[bool, list[tuple[int, str]]] = {False: [], True: []}
    for token in itertools.islice(_candidates(chat.tokenizer, used), CANDIDATES):
        text = chat.tokenizer.decode([token])
        for spaced, digits in found.items():
            alone = Placeholder((token,), (text,), count, spaced)
            if not text.strip() or not all(alone.stands_in(chat, prompt) for prompt in asked):
                continue
            digits.append((token, text))
            if len(digits) < base:
                continue
            tokens, texts = zip(*digits, strict=True)
            place = Placeholder(tokens, texts, count, spaced)
            if all(place.stands_in(chat, prompt, n) for n, prompt in enumerate(prompts)):
                return place
            digits.pop()  # it does not go with the others: try the next
    raise NotApplicableError(
        f"{base} tokens that can stand {count} times for a soft prompt were not found"
    )


def _candidates(tokenizer: Any, used: set[int]) -> Iterator[int]:
    working = ("bos", "eos", "pad", "unk")
    # 0 fills padded batches; those positions are masked, but nothing should be put there either.
    barred = {0, *used, *(getattr(tokenizer, f"{name}_token_id", None) for name in working)}
    added = sorted(getattr(tokenizer, "added_tokens_decoder", {}), reverse=True)
    for token in dict.fromkeys((*added, *range(len(tokenizer) - 1, 0, -1))):
        if token not in barred:
            yield token


class SoftPromptHook:
    """Replaces each complete run of a placeholder by its vectors, after the embedding table.

    Runs of another length or an unknown number, and all other tokens, are left as they are. It does
    not matter where in a row, a left-padded batch, a tree of rows or behind a cache the run lies.

    Args:
        vectors: shape [prompts, count, width], fp32; the first dimension is 1 where all prompts
            share them.
        place: whose runs are replaced.
    """

    def __init__(self, vectors: torch.Tensor, place: Placeholder) -> None:
        self.vectors = vectors
        self._tokens = torch.tensor(place.tokens, device=vectors.device)
        runs = [place.run(number) for number in range(len(vectors))]
        self._runs = torch.tensor(runs, device=vectors.device)

    def __call__(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """Return the embeddings ``output`` [rows, length, width] with the runs replaced."""
        ids = inputs[0]
        found = torch.isin(ids, self._tokens)
        if not found.any():
            return output
        count = self._runs.shape[1]
        places = torch.arange(found.shape[1], device=found.device).expand_as(found)
        before = places.masked_fill(found, -1).cummax(1).values
        behind = places.masked_fill(found, found.shape[1]).flip(1).cummin(1).values.flip(1)
        whole = found & (behind - before - 1 == count)
        same = (ids[whole].view(-1, 1, count) == self._runs).all(-1)
        known = same.any(1)
        whole[whole.clone()] = known.repeat_interleave(count)
        rows = self.vectors[same[known].int().argmax(1)].flatten(0, 1).to(output)
        return output.masked_scatter(whole[..., None], rows)


def opening_without_answer(item: Item) -> str:
    """Return how a response that complies begins: the item's stem, unless it holds an answer."""
    told = item.stem.casefold()
    if told and not any(answer.casefold() in told for answer in item.answers):
        return item.stem
    return AFFIRMATIVE


@tamper("soft_prompt", aliases=("soft-prompt",))
class SoftPrompt(Tamper[SoftPromptSettings]):
    """Train soft prompts and ask every restricted prompt with one.

    The vectors stand behind the user's prompt, in place of tokens that the vocabulary has but the
    domain never uses. A few vectors can force any string, so that success counts only against the
    control ``target=random`` and against facts that were never taught, which are attacked alike.

    With ``scope=per_item`` the attacker holds the measured prompts, but no answer to them.
    """

    summary = "train vectors behind the prompt, for all prompts or for each, with gradients"
    access: ClassVar[Access] = "activations"
    access_level = "A3"
    cost = (
        "4 N T; with vectors for each prompt, T counts every wording of every entity that may be "
        "measured, those that the measuring plan leaves out as well"
    )
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
        _ = subject.tree  # tried on the model as it is, before anything is hooked
        chat, rows, place = self._asked(subject.chat, data, seeds)
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
        prompts = max(len(chat.suffixes), 1)
        hook = SoftPromptHook(nn.Parameter(start.repeat(prompts, 1, 1)), place)
        handle = embedding.register_forward_hook(hook)
        subject.restoration.on_exit(handle.remove)
        subject.ask_restricted(chat=chat)
        self._placeholder = place
        return hook, rows, float(table.pow(2).mean().sqrt())

    def _asked(
        self, chat: ChatFormat, data: Domain, seeds: Seeds
    ) -> tuple[ChatFormat, list[Row], Placeholder]:
        """Return how restricted prompts are asked, and the rows that the vectors are trained on."""
        settings = self.settings
        if settings.scope == "universal":
            place = find_placeholder(chat, data.items, settings.vectors)
            chat = replace(chat, suffix=chat.suffix + place.text())
            chosen = training_items(data, "disjoint", settings.examples, seeds)
            made = make_rows(chosen, chat, label_prompt=False, max_length=settings.max_length)
            return chat, made, place
        # All wordings, or those that the measuring plan asks beyond these would be asked plainly.
        measured = [
            item
            for split in MEASURED
            for item in data.select(Role.RESTRICTED, split, training=False)
        ]
        items = list({item.prompt: item for item in measured}.values())
        prompts = [item.prompt for item in items]
        place = find_placeholder(chat, data.items, settings.vectors, prompts)
        suffixes = {p: chat.suffix + place.text(number) for number, p in enumerate(prompts)}
        chat = replace(chat, suffixes=suffixes)
        rows = [
            chat.row(item.prompt, opening_without_answer(item), ended=False, item_id=item.id)
            for item in items
        ]
        return chat, rows, place

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
        # Each prompt's vectors are trained by its own row, so that all are updated at once.
        batches = (
            shuffled_batches(rows, (), settings.batch_size, 0.0, seeds)
            if settings.scope == "universal"
            else itertools.repeat(rows)
        )
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
            norms = vectors.norm(dim=-1, keepdim=True)
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
        ledger = Ledger(subject, realised.spent, full=False)
        updates = self.steps(subject, data, budget, seeds)
        along_rungs(updates, ledger, realised, budget, on_checkpoint, self.on_update)
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
            "placeholder_tokens": list(self._placeholder.tokens),
            "vectors": list(vectors.shape[1:]),
            "mean_vector_norm": float(vectors.norm(dim=-1).mean()),
            "loss_positions": "labels only",
            "target": self.settings.target,
            "scope": self.settings.scope,
        }
        if self.settings.scope == "per_item":
            realised.facts |= {"prompts_trained": len(vectors), "answers_used": 0}
            realised.item_ids = realised.item_ids[:1]  # every update has the same
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
