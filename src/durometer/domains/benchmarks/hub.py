"""Fetching a benchmark from the hub with its own client and the user's token, when named."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from durometer.core.errors import STORAGE_ERRORS, InputError
from durometer.formats.safetensors import shown

__all__ = ["fetch_files"]


def fetch_files(name: str, repo: str, revision: str, patterns: Sequence[str]) -> Path:
    """Return the folder of a snapshot with the files that ``patterns`` name, and nothing else.

    The folder's name is the commit. Files that are cached already are not fetched again, and
    without a network the cached snapshot is used.

    Raises:
        InputError: no access, no such repository or revision, or a broken transfer; one line.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        with _quiet():
            folder = snapshot_download(
                repo, repo_type="dataset", revision=revision or None, allow_patterns=list(patterns)
            )
    except (HTTPError, OSError, ValueError) as error:
        if getattr(error, "errno", None) in STORAGE_ERRORS:
            raise
        raise InputError(f"{name}: {_reason(error, shown(repo), shown(revision))}") from error
    return Path(folder)


def _reason(error: Exception, repo: str, revision: str) -> str:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/datasets/{repo}"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"no access to '{repo}': accept its conditions at {page}, then set HF_TOKEN to your "
            "token (or: hf auth login)"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no data set '{repo}' on the hub, or a private one: set HF_TOKEN to a token that may "
            "read it (or: hf auth login)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no revision '{revision}' of '{repo}'; its history is at {page}/commits/main"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"'{repo}' could not be fetched whole: {shown(reason)}; run it again, nothing is lost"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client's progress bars out of the terminal."""
    from huggingface_hub import utils

    shown_before = not utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown_before:
            utils.enable_progress_bars()
