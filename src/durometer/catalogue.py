"""Imports every built-in method, so that the registries know them all."""

import importlib
import pkgutil

from durometer import domains, judges, measures, safeguards, subjects, tampers

for _package in (domains, subjects, tampers, measures, safeguards, judges):
    for _module in pkgutil.iter_modules(_package.__path__, f"{_package.__name__}."):
        importlib.import_module(_module.name)
