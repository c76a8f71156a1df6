"""Trials on disk: written whole, once, and never read as something that they are not."""

import collections
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import records

from durometer.core.errors import DurometerError, InputError, StorageError
from durometer.trials.record import STATUSES, TrialRecord
from durometer.trials.store import FILE, SCHEMA_VERSION, Store


def example(seed: int = 1, status: str = "done") -> TrialRecord:
    made = records.trial(
        records.checkpoint(0, 1, 2, 3, 4), records.checkpoint(2, 5, None), seed=seed, status=status
    )
    made.seeds = {"data_order": 2**63 - 1, "initialisation": 2, "sampling": 3, "evaluation": 4}
    made.realised = {"losses": [0.1, 1e-300], "changed": {"a": 1.5}, "facts": {"text": "é\u2028中"}}
    made.environment = {"threads": 1}
    return made


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "deep" / "run")


def test_a_record_comes_back_as_it_was(store: Store) -> None:
    record = example()
    store.add(record)
    assert store.get(record.key) == record
    assert list(store.trials()) == [record]
    assert store.get("no such key") is None
    assert TrialRecord.from_dict(json.loads(json.dumps(record.as_dict()))) == record
    assert isinstance(store.get(record.key).spec.rungs, tuple)  # type: ignore[union-attr]


def test_another_process_reads_what_was_written(store: Store) -> None:
    for seed in (3, 1, 2):
        store.add(example(seed))
    store.describe("suite", {"name": "quick", "é": None})
    store.describe("suite", {"name": "full"})
    store.close()
    again = Store.open(store.folder)
    assert [record.spec.seed for record in again.trials()] == [3, 1, 2]
    assert again.description("suite") == {"name": "full"}
    assert again.description("nothing") is None
    assert sorted(path.name for path in store.folder.iterdir() if path.suffix == ".sqlite") == [
        FILE
    ]


def test_a_key_is_written_once(store: Store) -> None:
    first, second = example(), example()
    second.seconds = 99.0
    store.add(first)
    store.add(second)
    assert list(store.trials()) == [first]


def test_a_finished_trial_of_another_run_is_taken_over(store: Store, tmp_path: Path) -> None:
    lender = Store(tmp_path / "lender")
    done, failed = example(1), example(2, status="errored")
    lender.add(done)
    lender.add(failed)
    lender.close()
    assert store.borrow(done.key) is None
    store.lend_from([lender.folder])
    assert store.borrow(done.key) == store.get(done.key) == done
    assert store.borrow(failed.key) is store.borrow("other") is None


def test_a_folder_without_a_run_lends_nothing(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run here"):
        store.lend_from([tmp_path])


def test_statuses_are_counted(store: Store) -> None:
    for seed, status in enumerate(STATUSES):
        store.add(example(seed, status))
    store.add(example(99))
    assert store.statuses() == dict.fromkeys(STATUSES, 1) | {"done": 2}


def test_what_failed_can_be_forgotten_and_run_again_in_order(store: Store) -> None:
    """A record written after others were dropped comes after those that stayed."""
    for seed, status in ((1, "errored"), (2, "done"), (3, "out_of_memory"), (4, "done")):
        store.add(example(seed, status))
    store.forget(("errored", "out_of_memory"))
    assert store.statuses() == {"done": 2}
    for seed in (1, 3):
        store.add(example(seed))
    assert [record.spec.seed for record in store.trials()] == [2, 4, 1, 3]


def test_trials_of_an_earlier_campaign_are_kept_but_not_counted(store: Store) -> None:
    old, new = example(1, "errored"), example(2)
    store.add(old)
    store.add(new)
    store.name_own([new.key])
    for reader in (store, Store.open(store.folder)):
        assert list(reader.trials()) == [new]
        assert reader.statuses() == {"done": 1}
        assert reader.get(old.key) == old


def test_a_killed_process_leaves_whole_records_only(tmp_path: Path) -> None:
    """Killed without warning while it writes: what is there can be read, and is complete."""
    script = (
        "import sys, records; from pathlib import Path; from durometer.trials.store import Store\n"
        "store = Store(Path(sys.argv[1]))\n"
        "seed = 0\n"
        "while True:\n"
        "    seed += 1\n"
        "    store.add(records.trial(records.checkpoint(1, 20, 20, 20), seed=seed))\n"
        "    print(seed, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    ) as process:
        assert process.stdout is not None
        told = 0
        while told < 5:
            told = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        told = max([told, *(int(line) for line in process.stdout.read().split())])
    found = list(Store.open(tmp_path / "run").trials())
    assert len(found) in (told, told + 1)
    assert [record.spec.seed for record in found] == list(range(1, len(found) + 1))
    assert all(len(record.checkpoints[0].items) == 3 * records.N for record in found)


def test_a_record_that_is_no_json_is_not_written_in_part(store: Store) -> None:
    bad = example()
    bad.realised["losses"] = [float("nan")]
    with pytest.raises(ValueError, match="JSON"):
        store.add(bad)
    assert store.statuses() == {}


@pytest.mark.parametrize(
    "damage",
    [
        b"not compressed",
        zlib.compress(b"not json"),
        zlib.compress(b'{"key": 1}'),
        zlib.compress(b"[]"),
        zlib.compress(json.dumps(example().as_dict() | {"unknown": 1}).encode()),
        zlib.compress(json.dumps(example().as_dict()).encode())[:-8],
        b"",
    ],
)
def test_a_damaged_record_is_one_line(store: Store, damage: bytes) -> None:
    store.add(example())
    store.close()
    with sqlite3.connect(store.folder / FILE) as connection:
        connection.execute("update trials set record = ?", (damage,))
    connection.close()
    for read in (lambda s: list(s.trials()), lambda s: s.get(example().key)):
        with pytest.raises(StorageError, match="damaged") as caught:
            read(Store.open(store.folder))
        assert "\n" not in str(caught.value)


def test_another_schema_version_is_refused(store: Store) -> None:
    store.describe("schema_version", SCHEMA_VERSION + 1)
    store.close()
    with pytest.raises(StorageError, match=f"schema {SCHEMA_VERSION + 1}"):
        Store(store.folder)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match="no run here"):
            Store.open(place)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database_is_one_line(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"this is not a database, whatever it is called" * 99)
    with pytest.raises(StorageError, match="not a database"):
        Store.open(tmp_path)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="--out"):
        Store(tmp_path / "file" / "run")


def test_a_full_disk_is_one_line_and_keeps_what_is_there(store: Store) -> None:
    store.add(example())
    pages = store._connection.execute("pragma page_count").fetchone()[0]
    store._connection.execute(f"pragma max_page_count = {pages}")
    with pytest.raises(DurometerError, match="full"):
        collections.deque(map(store.add, map(example, range(2, 200))))
    assert example() in list(store.trials())


def test_a_run_folder_can_be_moved(store: Store, tmp_path: Path) -> None:
    store.add(example())
    store.close()
    shutil.move(store.folder, tmp_path / "elsewhere")
    assert list(Store.open(tmp_path / "elsewhere").trials()) == [example()]
