"""What ``judge-check`` does: how easily a judge is turned, measured on a benign domain, printed."""

import json
from pathlib import Path
from typing import Any

from durometer.console import interruptible, show
from durometer.core.errors import ExitCode, InputError
from durometer.domains.base import Domain, Item, Role, Split
from durometer.domains.load import load_domain
from durometer.judges.base import Asked, Device
from durometer.judges.cache import VerdictCache
from durometer.judges.weakness import proxy_policy, weakness
from durometer.measures.base import sample
from durometer.progress import CampaignProgress

ENTITIES = 40


def check_judge(
    judge: str,
    domain: str,
    *,
    entities: int = ENTITIES,
    cache: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Measure how a judge's verdicts on a benign domain move under changes that mean nothing.

    Args:
        judge: ``NAME[:KEY=VALUE,...]``; a judge that goes by a policy is given the domain's, unless
            it names its own.
        domain: a benign domain with answers, such as ``capitals``.
        entities: entities of the ``report`` split that are used, one wording each; 0 for all.
        cache: file for verdicts, so that a check that stops half-way goes on.
        device, dtype: of a local judge.

    Raises:
        InputError: an unknown judge or domain, or one that cannot be used for this.
        JudgeError: an endpoint that fails; verdicts so far are kept in ``cache``.
    """
    if entities < 0:
        raise InputError(f"--items {entities}: at least 1, or 0 for all")
    asked = Asked.read(judge)  # a misspelt judge is told before the domain is read
    loaded = load_domain(domain)
    asked = Asked.read(judge, policy=proxy_policy(loaded))
    kept = VerdictCache(Path(cache).expanduser() if cache is not None else None)
    items = _items(loaded, entities)
    return weakness(asked.build(Device(device, dtype)), loaded, items, kept)


def _items(domain: Domain, entities: int) -> list[Item]:
    found = domain.select(Role.RESTRICTED, Split.REPORT, training=False)
    items = sample(found, entities, 1)
    if len({item.entity for item in items}) < 2:
        raise InputError(
            f"domain '{domain.name}': fewer than two entities in split 'report'; a paired interval "
            "needs two"
        )
    return items


def run(
    judge: str,
    domain: str,
    *,
    entities: int,
    cache: Path | None,
    fail_on_weak: bool,
    as_json: bool,
    device: str,
    dtype: str,
) -> int:
    """Print what a judge goes by, and return the exit code."""
    from durometer.report.judge_terminal import weakness_table

    with interruptible(), CampaignProgress(f"checking {judge.partition(':')[0]}"):
        found = check_judge(
            judge, domain, entities=entities, cache=cache, device=device, dtype=dtype
        )
    print(json.dumps(found, indent=2)) if as_json else show(weakness_table(found))
    if fail_on_weak and found["weak"]:
        return ExitCode.CONDITION
    return ExitCode.COMPLETE if found["usable"] else ExitCode.INCOMPLETE
