"""Builds the known-answer set in memory, audits every variant, and writes down what was found.

    python studies/audit/known_answers.py FAMILY ...     audit what is not in the rows yet
    python studies/audit/known_answers.py --summary      rows -> known_answers.json and README.md

One JSON line a variant is appended to ``results/rows.jsonl``; a run that was broken off goes on
where it stopped. No edited weight is ever written; models saved in harmless ways are, into a
temporary folder, to be audited with all their files.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import saved
from parents import FAMILIES, Family, Workshop
from variants import Stock, Variant, sequence_of

from durometer.audit.files import read_artefact
from durometer.audit.forensics import ablation, alone, calibration
from durometer.audit.forensics.comparison import Comparison
from durometer.audit.run import AuditRequest
from durometer.audit.run import audit as audit_folder
from durometer.audit.tensors import ArraySource, open_tensors
from durometer.findings import Finding

RESULTS = Path(__file__).resolve().parent / "results"
ROWS = RESULTS / "rows.jsonl"


def audit(stock: Stock, variant: Variant) -> dict[str, Any]:
    """Return the row of one variant."""
    begun = time.perf_counter()
    comparison, found = (_in_files if variant.in_files else _in_memory)(stock, variant)
    seconds = time.perf_counter() - begun
    scores = {
        side: ablation.removal_score(comparison.projections[side], comparison.evidence[side])
        for side in comparison.projections
    }
    return {
        "family": stock.shop.family.name,
        "half": stock.shop.family.half,
        "key": variant.key,
        "parent": variant.parent,
        "kind": variant.kind,
        "expected": list(variant.expected),
        "facts": variant.facts,
        "direction": stock.directions.get(variant.parent, (None, None))[1],
        "scores": scores,
        "score": max(scores.values()),
        "findings": [_told(finding) for finding in found],
        "seconds": round(seconds, 3),
        "calibration": calibration.VERSION,
    }


def _told(finding: Finding) -> dict[str, Any]:
    return {
        "check": finding.check,
        "status": finding.status.value,
        "severity": finding.severity.label,
        "title": finding.title,
        "evidence": {
            name: value
            for name, value in finding.evidence.items()
            if isinstance(value, int | float | str)
        },
    }


def _in_memory(stock: Stock, variant: Variant) -> tuple[Comparison, list[Finding]]:
    """Compare arrays."""
    subject = ArraySource(variant.make())  # type: ignore[call-arg, arg-type]
    states = stock.states
    also = [ArraySource(states[name]) for name in variant.also]
    comparison = Comparison(subject, ArraySource(states[variant.claimed]), also)
    found = comparison.run()
    return comparison, [*found, *_alone(variant, subject)]


def _in_files(stock: Stock, variant: Variant) -> tuple[Comparison, list[Finding]]:
    """Write harmless files, audit all of them as a user does, and remove them again."""
    if variant.kind != "harmless":
        raise ValueError(f"{variant.key}: only harmless variants are written to files")
    with tempfile.TemporaryDirectory() as home:
        places = [Path(home) / name for name in ("subject", "base")]
        for place in places:
            place.mkdir()
        target = variant.make(places[0])  # type: ignore[call-arg]
        plain = saved.start(stock.shop, stock.states[variant.claimed])
        base = saved.write(stock.shop, plain, places[1])
        found = audit_folder(AuditRequest(target, base=base)).findings
        comparison = Comparison(*(open_tensors(read_artefact(each)) for each in (target, base)))
        comparison.run()
    return comparison, list(found)


def _alone(variant: Variant, subject: ArraySource) -> list[Finding]:
    """Audit without a base where that is of interest; names say so."""
    facts = variant.facts
    if variant.kind != "harmless" and (facts.get("healing"), facts.get("bits")) != ("none", 16):
        return []
    return [replace(f, check=f"{f.check} (no base)") for f in alone(subject)]


def run(family: Family, limit: float) -> None:
    """Audit the variants of ``family`` that have no row yet, within ``limit`` seconds."""
    begun = time.perf_counter()
    done = {(row["family"], row["key"]) for row in rows()}
    shop = Workshop(family)
    states = {"base": shop.base}
    for recipe in family.parents:
        states[recipe.name] = shop.train(shop.base, recipe)
        print(
            f"{family.name} {recipe.name} trained, {time.perf_counter() - begun:.0f} s", flush=True
        )
    stock = Stock(shop, states)
    every = sequence_of(stock)
    for number, variant in enumerate(every):
        if (family.name, variant.key) in done:
            continue
        if time.perf_counter() - begun > limit:
            print(f"stopped at {number} of {len(every)} after {limit:.0f} s", flush=True)
            return
        row = audit(stock, variant)
        append(row)
        verdicts = [f["check"] for f in row["findings"] if f["status"] == "found"]
        print(
            f"{number + 1}/{len(every)} {variant.key}: score {row['score']:.3f}, {verdicts}, "
            f"{row['seconds']:.1f} s",
            flush=True,
        )


def rows() -> list[dict[str, Any]]:
    """Return the rows so far, the latest of each variant; a line that was cut off is dropped."""
    if not ROWS.is_file():
        return []
    found = [json.loads(line) for line in ROWS.read_text("utf-8").split("\n")[:-1]]
    return list({(row["family"], row["key"]): row for row in found}.values())


def append(row: dict[str, Any]) -> None:
    """Append one row in a single write."""
    RESULTS.mkdir(exist_ok=True)
    line = (json.dumps(row) + "\n").encode()
    handle = os.open(ROWS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line)
    finally:
        os.close(handle)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help=", ".join(f.name for f in FAMILIES))
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds a family")
    parser.add_argument("--summary", action="store_true", help="write the summary of the rows")
    options = parser.parse_args()
    for family in FAMILIES:
        if family.name in options.families:
            run(family, options.limit)
    if options.summary:
        from summary import write

        write(rows(), RESULTS)


if __name__ == "__main__":
    main()
