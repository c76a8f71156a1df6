"""How tasks of lm-eval are named: ``TASK[,TASK ...][,KEY=VALUE ...]`` behind ``lm-eval:``."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from durometer.core.errors import InputError, unknown_name

FAMILY = "lm-eval"
SETTINGS = ("limit", "shots", "chat", "hub")
_WORDS = {"yes": True, "no": False}


@dataclass(frozen=True)
class HarnessSpec:
    """One task, or group of tasks, and how it is asked.

    Attributes:
        task: a name of lm-eval's own, or the path of a YAML file.
        limit: rows that are drawn, always the same ones; 0 for all; None leaves it to the plan.
        shots: examples before every question; None leaves it to the task.
        chat: whether the subject's chat template is put around the prompts.
        hub: whether the task's data set may be fetched.
    """

    task: str
    limit: int | None = None
    shots: int | None = None
    chat: bool = False
    hub: bool = False

    @property
    def path(self) -> Path | None:
        """Return the task's file; None for a name."""
        if not re.search(r"\.ya?ml$|/", self.task):
            return None
        return Path(os.path.expanduser(self.task))

    @property
    def rest(self) -> str:
        """Return the text that is read as this and nothing else."""
        given = {"limit": self.limit, "shots": self.shots}
        told = [f"{key}={value}" for key, value in given.items() if value is not None]
        told += [f"{key}=yes" for key in ("chat", "hub") if getattr(self, key)]
        return ",".join([self.task, *told])


def parse_harness(text: str) -> tuple[HarnessSpec, ...]:
    """Return the tasks that ``text`` names, each once, with the settings that hold for all.

    Raises:
        InputError: no task, an unknown setting, or a value that it cannot have.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    tasks = [part for part in parts if "=" not in part]
    if not tasks:
        raise InputError(f"--measure {FAMILY}: name a task, as in {FAMILY}:arc_easy,hub=yes")
    pairs = (part.partition("=") for part in parts if "=" in part)
    settings: dict[str, Any] = {key: _value(key, value) for key, _, value in pairs}
    return tuple(HarnessSpec(task, **settings) for task in dict.fromkeys(tasks))


def _value(key: str, value: str) -> int | bool:
    if key not in SETTINGS:
        raise unknown_name(f"setting of {FAMILY}", key, SETTINGS)
    if key in ("chat", "hub"):
        if value not in _WORDS:
            raise InputError(f"--measure {FAMILY}: {key}={value}: yes or no")
        return _WORDS[value]
    if not re.fullmatch(r"\d{1,7}", value):
        raise InputError(f"--measure {FAMILY}: {key}={value}: a whole number, 0 or more")
    return int(value)
