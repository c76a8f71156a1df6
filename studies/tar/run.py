"""TAR's results in kind on `micro` and `world`, part by part; every part can be gone on with.

    python studies/tar/run.py PART --work DIR [--workers 2] [limits]

A model that was trained is not trained again, a trial that is in results/ is not run again, except
errored ones with --retry. Weights stay in the work folder; results/*.jsonl hold a line for every
model and trial. The part `summary` writes results/summary.json and the figures of docs/tar.md.
"""

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded, here and in workers

import tar_pages
import tar_summary
from tar_attacks import BY_NAME, refuse_trained
from tar_jobs import MODELS, Make, Results, run_jobs
from tar_plan import (
    LIMITS,
    LONG_FACTOR,
    SEED,
    UNDEFENDED,
    Limits,
    Model,
    Trial,
    ablations,
    all_models,
    chosen,
    crossed,
    figure3_models,
    plain_model,
    released_model,
    tar_model,
    tiny_tar,
    trained_against,
    undefended_share,
    with_seeds,
)
from tar_trials import attack, train, trajectory

from durometer.trials.suites import dense_ladder

HERE = Path(__file__).resolve().parent
IMAGES = HERE.parents[1] / "docs" / "images"
Json = dict[str, Any]
FIGURE5 = "full 3e-4"
FIGURE3_RATE = 1e-3


@dataclass
class Study:
    """What has been found so far, and where to go on.

    Attributes:
        work: folder of the trained models.
        retry: run errored jobs again.
    """

    results: Results
    work: Path
    workers: int
    retry: bool = False
    train: Make = train
    attack: Make = attack
    trajectory: Make = trajectory

    def models(self, models: Iterable[Model]) -> None:
        """Train and measure what is missing; those that need TAR's folder come last."""
        wanted = [UNDEFENDED, *models]
        first = [m for m in wanted if "{tar}" not in m.spec]
        second = [m for m in wanted if "{tar}" in m.spec]
        first += [tar_model(m.kind, m.seed) for m in second]
        for batch in (first, second):
            jobs = {m.identity: self._model_job(m) for m in batch if self._missing_model(m)}
            self._run(MODELS, list(jobs.values()), self.train, lambda job: {"spec": job["told"]})

    def _missing_model(self, model: Model) -> bool:
        found = self.results.models.get(model.identity)
        if found is None or (found["status"] == "errored" and self.retry):
            return True
        return found["status"] == "done" and not model.builtin and not self._folder(model).exists()

    def _folder(self, model: Model) -> Path:
        return self.work.resolve() / model.identity

    def _model_job(self, model: Model) -> Json:
        like = str(self._folder(tar_model(model.kind, model.seed)))
        return {
            "key": model.identity,
            "kind": model.kind,
            "builtin": model.builtin,
            "told": model.spec or model.builtin,
            "spec": model.spec.replace("{tar}", like),
            "seed": model.seed,
            "folder": str(self._folder(model)),
        }

    def trials(self, part: str, trials: Sequence[Trial], more: Json | None = None) -> None:
        """Run what is missing: first the same attacks on the undefended subject.

        Args:
            more: replaces settings of the jobs.
        """
        for trial in trials:
            refuse_trained(trained_against(trial.model), [trial.adversary], trial.cap)
        without = {t.key(self.results): t for trial in trials for t in trial.undefended()}
        self._attack(part, without.values(), lambda trial: None)
        self._attack(part, trials, lambda trial: undefended_share(self.results, trial), more)

    def _attack(
        self,
        part: str,
        trials: Iterable[Trial],
        undefended: Callable[[Trial], float | None],
        more: Json | None = None,
    ) -> None:
        jobs = []
        for trial in trials:
            share = undefended(trial)
            lost = share is None and trial.model != UNDEFENDED
            if self._missing_trial(trial.key(self.results)) and not lost:
                jobs.append(
                    trial.job(self.results, self.work.resolve(), share)
                    | {"model": trial.model.identity, **(more or {})}
                )
        self._run(part, jobs, self.attack, told_of_trial)

    def _missing_trial(self, key: str) -> bool:
        found = self.results.trials.get(key)
        return bool(key) and (found is None or (found["status"] == "errored" and self.retry))

    def paths(self, part: str, jobs: Iterable[Json]) -> None:
        """Run the missing trajectories."""
        missing = [job for job in jobs if self._missing_trial(job["key"])]
        self._run(part, missing, self.trajectory, told_of_trial)

    def _run(
        self, part: str, jobs: Sequence[Json], make: Make, about: Callable[[Json], Json]
    ) -> None:
        begun, count = time.perf_counter(), 0

        def done(job: Json, found: Json) -> None:
            nonlocal count
            count += 1
            found = self._without_paths(found)
            self.results.add(part, {"key": job["key"], **about(job), **found})
            minutes = (time.perf_counter() - begun) / 60
            left = minutes / count * (len(jobs) - count)
            told = found["reason"] if found.get("reason") else found.get("broke", {})
            print(
                f"{part} {count}/{len(jobs)}, {left:.0f} min left: {job['key']} "
                f"{found['status']} {told}",
                flush=True,
            )

        run_jobs(jobs, self.workers, make, done)

    def _without_paths(self, found: Json) -> Json:
        """Keep this machine's folders out of what is committed."""
        if found.get("reason"):
            reason = found["reason"].replace(str(self.work.resolve()), "WORK")
            return found | {"reason": reason.replace(str(Path.home()), "~")}
        return found


def told_of_trial(job: Json) -> Json:
    """Return what a trial's record says of the job."""
    names = ("model", "adversary", "seed", "order", "cap", "undefended")
    return {
        name: round(job[name], 4) if name == "undefended" and job[name] is not None else job[name]
        for name in names
        if name in job
    }


# ---- the parts -----------------------------------------------------------------------------


def screen_models(limits: Limits) -> list[Model]:
    """Return all safeguards and controls that the limits allow."""
    return chosen(all_models(limits.kinds), limits)


def screen_trials(results: Results, limits: Limits) -> list[Trial]:
    """Return every sentinel on every safeguard."""
    return list(crossed(screen_models(limits), limits))


def best_models(results: Results, limits: Limits) -> list[Model]:
    """Return the best of the screen, shared out over the kinds, and always TAR and its start.

    Names in the limits replace the choice.
    """
    before = Limits.of(results.limits().get("screen", LIMITS["screen"].as_dict()))
    rows = [] if limits.safeguards else screen_rows(results, before)
    models = {(m.kind, m.label): m for m in all_models(limits.kinds)}
    found: list[Model] = []
    for kind in limits.kinds:
        labels = tar_summary.best(rows, kind, limits.best // len(limits.kinds))
        labels = list(limits.safeguards) or labels
        found += [models[kind, label] for label in labels if (kind, label) in models]
        found += [plain_model(kind), tar_model(kind)]
    return list(dict.fromkeys(found))


def screen_rows(results: Results, limits: Limits) -> list[Json]:
    """Return the rows of the screen."""
    rows: list[Json] = tar_summary.part(results, screen_trials(results, limits))["rows"]
    return rows


def best_trials(results: Results, limits: Limits) -> list[Trial]:
    """Return every adversary on the best of the screen."""
    return list(crossed(best_models(results, limits), limits))


def seeds_models(results: Results, limits: Limits) -> list[Model]:
    """Return TAR, its start and the best others of each kind with several training seeds."""
    before = Limits.of(results.limits().get("best", LIMITS["best"].as_dict()))
    rows = tar_summary.part(results, best_trials(results, before))["rows"]
    models = {(m.kind, m.label): m for m in all_models(limits.kinds)}
    found: list[Model] = []
    for kind in limits.kinds:
        others = [r for r in rows if r["label"] not in ("tar", plain_model(kind).label)]
        labels = list(limits.safeguards) or tar_summary.best(others, kind, limits.best)
        found += [plain_model(kind), tar_model(kind)]
        found += [released_model(kind)] * (kind == "knowledge")
        found += [models[kind, label] for label in labels if (kind, label) in models]
    return with_seeds(dict.fromkeys(found), limits)


def seeds_trials(results: Results, limits: Limits) -> list[Trial]:
    """Return every adversary at the cap, and the strongest third of each kind at twice the cap."""
    trials = list(crossed(seeds_models(results, limits), limits))
    longer: list[Trial] = []
    for kind in limits.kinds:
        own = [t for t in trials if t.model.kind == kind]
        _, statuses = tar_summary.records_of(results, own)
        strong = [] if statuses["missing"] else tar_summary.strongest(results, own)
        longer += [
            replace(t, cap=LONG_FACTOR * t.cap)
            for t in own
            if t.adversary.name in strong and t.reach == t.cap and goes_on(results, t)
        ]
    return [*trials, *longer]


def goes_on(results: Results, trial: Trial) -> bool:
    """Say whether a trial was not over at its cap."""
    found = results.trials.get(trial.key(results), {"status": "missing"})
    broke = found.get("broke", {}).get("report", {})
    return found["status"] == "done" and tar_summary.KEPT not in broke


def ablation_trials(results: Results, limits: Limits) -> list[Trial]:
    """Return every sentinel on every ablation of TAR; no model twice."""
    models = [
        m for kind in limits.kinds for axis in ablations(kind).values() for m in axis.values()
    ]
    return list(crossed({m.identity: m for m in models}.values(), limits))


def figure5_trials(results: Results, limits: Limits) -> list[Trial]:
    """Return one attack on TAR in several data orders."""
    model, adversary = tar_model("knowledge"), BY_NAME[FIGURE5]
    return [
        Trial(model, adversary, 1, limits.cap, {"order": order})
        for order in range(1, limits.seeds + 1)
    ]


def figure3_jobs(results: Results, limits: Limits, work: Path) -> dict[str, dict[str, list[Json]]]:
    """Return the trajectories by loss and by how long the model was trained."""
    return {
        loss: {when: _paths(results, limits, work, model) for when, model in times.items()}
        for loss, times in figure3_models().items()
    }


def _paths(results: Results, limits: Limits, work: Path, model: Model) -> list[Json]:
    found, tar = results.models.get(model.identity, {}), tiny_tar()
    if found.get("status") != "done":
        return []
    inner = tar.inner_steps
    cap = limits.cap or 4 * inner
    rungs = sorted({*range(1, min(inner, cap) + 1), *range(inner, cap + 1, 4)})
    common = {"model": model.identity, "place": model.place(work.resolve()), "kind": model.kind}
    return [
        common
        | {
            "key": f"{model.identity}|{found['fingerprint'][:12]}|path|{adversary}|{seed}|{cap}",
            "fingerprint": found["fingerprint"],
            "adversary": adversary,
            "seed": seed,
            "rate": FIGURE3_RATE,
            "batch": tar.inner_batch,
            "cap": cap,
            "switch": round(2 * inner / 3) / cap,
            "rungs": rungs,
        }
        for adversary in ("restricted", "switch", "mix")
        for seed in range(1, limits.seeds + 1)
    ]


def run_part(study: Study, part: str, limits: Limits) -> None:
    """Run one part."""
    results = study.results
    results.note(part, limits.as_dict())
    if part == "figure3":
        study.models(m for times in figure3_models().values() for m in times.values())
        jobs = figure3_jobs(results, limits, study.work)
        study.paths(part, [j for times in jobs.values() for found in times.values() for j in found])
        return
    trials_of = TRIALS[part]
    study.models(dict.fromkeys(trial.model for trial in trials_of(results, limits)))
    if part == "figure5":
        _figure5(study, trials_of(results, limits), limits)
        return
    for _ in range(2):  # the second round: trials that go on beyond the cap
        study.trials(part, trials_of(results, limits))


TRIALS = {
    "screen": screen_trials,
    "best": best_trials,
    "seeds": seeds_trials,
    "ablations": ablation_trials,
    "figure5": figure5_trials,
}


def _figure5(study: Study, trials: Sequence[Trial], limits: Limits) -> None:
    """Run the data orders, closely measured, each to its end."""
    steps = {*dense_ladder(limits.cap), *range(20, limits.cap + 1, 20)}
    study.trials("figure5", trials, {"rungs": sorted(steps), "stop": False, "whole": True})


# ---- the summary ---------------------------------------------------------------------------


def summarise(results: Results, work: Path) -> Json:
    """Return all numbers of the documentation; parts that were not run are left out."""
    told: Json = {"training_seed": SEED, "limits": {}}
    for part, found in results.limits().items():
        limits = Limits.of(found)
        told["limits"][part] = tar_summary.limits_told(limits)
        if part == "figure3":
            told[part] = _figure3_summary(results, limits, work)
        elif part == "figure5":
            told[part] = _figure5_summary(results, limits)
        elif part == "ablations":
            told[part] = _ablation_summary(results, limits)
        else:
            told[part] = tar_summary.part(results, TRIALS[part](results, limits))
    return {part: found for part, found in told.items() if found is not None}


def _figure3_summary(results: Results, limits: Limits, work: Path) -> Json | None:
    jobs = figure3_jobs(results, limits, work)
    records = {
        loss: {
            when: [results.trials.get(job["key"], {"status": "missing"}) for job in found]
            for when, found in times.items()
        }
        for loss, times in jobs.items()
    }
    every = [r for times in records.values() for found in times.values() for r in found]
    named = {
        loss: {when: [r for r in found if "curve" in r] for when, found in times.items()}
        for loss, times in records.items()
    }
    if not any("curve" in r for r in every):
        return None
    statuses = Counter(r["status"] for r in every)
    return tar_summary.figure3(named, tiny_tar().inner_steps, statuses)


def _figure5_summary(results: Results, limits: Limits) -> Json | None:
    trials = figure5_trials(results, limits)
    records, statuses = tar_summary.records_of(results, trials)
    if not records:
        return None
    start = results.models[trials[0].model.identity]["start"]
    share = undefended_share(results, trials[0])
    return {
        "adversary": FIGURE5,
        "statuses": dict(statuses),
        **tar_summary.figure5(records, share, start),
    }


def _ablation_summary(results: Results, limits: Limits) -> Json:
    trials = ablation_trials(results, limits)
    found: Json = {"adversaries": tar_summary.adversaries(results, trials), "axes": {}}
    for kind in limits.kinds:
        found["axes"][kind] = {
            axis: {
                value: tar_summary.row(
                    results,
                    value,
                    kind,
                    [t for t in trials if t.model.identity == model.identity],
                )
                for value, model in models.items()
            }
            for axis, models in ablations(kind).items()
        }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one part, or summarise."""
    args = parsed(arguments)
    results = Results(args.results)
    if args.part != "summary":
        study = Study(results, args.work, args.workers, args.retry)
        run_part(study, args.part, limited(args))
        return
    summary = summarise(results, args.work)
    text = json.dumps(summary, indent=1, sort_keys=True)
    (args.results / "summary.json").write_text(text + "\n", "utf-8")
    args.images.mkdir(parents=True, exist_ok=True)
    for name, drawing in tar_pages.figures(summary).items():
        (args.images / f"{name}.svg").write_text(drawing, "utf-8")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's values."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("part", choices=[*LIMITS, "summary"])
    parser.add_argument("--work", type=Path, required=True, help="folder of trained models")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--retry", action="store_true", help="run errored jobs again")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--images", type=Path, default=IMAGES)
    for name in ("cap", "seeds", "best", "training-seeds"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("kinds", "safeguards"):
        parser.add_argument(f"--{name}", help="names with commas between")
    parser.add_argument("--adversaries", help="names with semicolons between")
    return parser.parse_args(arguments)


def limited(args: argparse.Namespace) -> Limits:
    """Return the limits of the part, with those that the command line names."""
    named = {
        "cap": args.cap,
        "seeds": args.seeds,
        "best": args.best,
        "training_seeds": args.training_seeds,
        "kinds": args.kinds and tuple(args.kinds.split(",")),
        "safeguards": args.safeguards and tuple(args.safeguards.split(",")),
        "adversaries": args.adversaries and tuple(args.adversaries.split(";")),
    }
    return replace(LIMITS[args.part], **{k: v for k, v in named.items() if v is not None})


if __name__ == "__main__":
    main()
