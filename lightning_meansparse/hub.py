"""push_adapter: an adapter and its card onto the Hugging Face Hub, in one commit."""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from torch import nn

from lightning_meansparse.adapter import Adapter, base_repository, is_public, read_adapter
from lightning_meansparse.adapter.files import HUB_ID, write_adapter
from lightning_meansparse.adapter.models import describe
from lightning_meansparse.card import model_card

T = TypeVar("T")

_CARD_NAME = "README.md"
_WAITS = (1.0, 4.0, 16.0)  # seconds before another attempt, while the Hub is busy


def push_adapter(
    model_or_folder: nn.Module | str | os.PathLike[str],
    repo_id: str,
    *,
    base: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload MeanSparse adapter",
    records: str | os.PathLike[str] | None = None,
    license: str | None = None,
) -> str:
    """Publish an adapter on the Hugging Face Hub, with a model card.

    The repository is made if there is none. Both files and the card arrive in one commit or not at
    all; where the Hub is busy or the connection breaks, it is tried again; what is there already is
    not sent once more. A base on the Hub whose commit is not known is pinned to its newest.
    Afterwards ``load_classifier("meansparse/<repo_id>")`` loads base and adapter together.

    Args:
        model_or_folder: A sparsified and calibrated model, a folder of `save_adapter`, or a
            Lightning checkpoint written with the callback in place.
        repo_id: ``"org/name"`` on the Hub.
        base: Where others find the base, as in `save_adapter`; None keeps what the adapter says.
        revision: Branch; made if there is none. None for the main one.
        private: Whether a new repository is private; None for the organisation's habit. One that
            exists stays as it is.
        token: Access token with the right to write; None takes that of ``hf auth login``.
        commit_message: Title of the commit.
        records: Output folder of a sweep, or its ``records.parquet``: results for the card.
        license: As the Hub names it, such as ``"apache-2.0"``.

    Returns:
        The commit, which ``revision=`` of `load_classifier` takes.

    Raises:
        ValueError: If the adapter is not sound, ``repo_id`` is no id, the base does not exist, or
            the records are of something else.
        FileNotFoundError: If there is no such folder, or there are no records.
        PermissionError: If nobody is logged in, or the token must not write there.
        ConnectionError: If the Hub cannot be reached.

    Examples:
        >>> from lightning_meansparse import load_classifier
        >>> commit = push_adapter("my-adapter", "org/name")  # doctest: +SKIP
        >>> load_classifier("meansparse/org/name", revision=commit)  # doctest: +SKIP
    """
    from huggingface_hub import HfApi, get_token

    if not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id must look like 'org/name', got {repo_id!r:.80}.")
    if isinstance(model_or_folder, nn.Module):
        adapter = describe(model_or_folder)
    else:
        adapter = read_adapter(model_or_folder)
    if base is not None and base != adapter.source:
        adapter = replace(adapter, source=base, revision=None, options={})
    if not is_public(adapter.source):
        warnings.warn(
            f"the adapter's base is called {adapter.source!r}, which nobody can fetch, so only "
            "load_adapter will work with it. Publish the base, and name it by save_adapter(..., "
            "base='timm/hf-hub:org/name') or 'hf/org/name'.",
            stacklevel=2,
        )
    if token is None and get_token() is None:
        raise PermissionError("nobody is logged in to the Hub: run `hf auth login`, or give token=")
    api = HfApi(token=token)
    with _explained(repo_id):
        adapter = _patiently(lambda: _pinned(api, adapter))
        card = model_card(adapter, repo_id=repo_id, records=records, license=license)
        with TemporaryDirectory() as scratch:
            folder = write_adapter(adapter, scratch)
            contents = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
        contents[_CARD_NAME] = card.encode()
        _patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        if revision is not None:
            _patiently(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        return _patiently(lambda: _commit(api, repo_id, revision, contents, commit_message))


def _pinned(api: Any, adapter: Adapter) -> Adapter:
    """The same adapter with the commit of its base, if that is on the Hub."""
    from huggingface_hub.errors import RepositoryNotFoundError

    name, _, named = (adapter.source or "").partition("@")
    repository = base_repository(name)
    if repository is None or adapter.revision is not None:
        return adapter
    try:
        commit = api.repo_info(repository, revision=named or None).sha
        return replace(adapter, source=name, revision=commit)
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"the adapter's base, {adapter.source}, is not on the Hub. Publish it first, or name "
            "another by save_adapter(..., base=...)."
        ) from error


def _commit(
    api: Any, repo_id: str, revision: str | None, contents: Mapping[str, bytes], message: str
) -> str:
    """One commit on top of the newest, unless that has the same files: an answer may get lost."""
    from huggingface_hub import CommitOperationAdd

    head: str = api.repo_info(repo_id, revision=revision).sha
    there = {
        file.path: file.lfs.sha256 if file.lfs else file.blob_id
        for file in api.get_paths_info(repo_id, list(contents), revision=head)
    }
    if all(there.get(name) in _names_of(data) for name, data in contents.items()):
        return head
    made = api.create_commit(
        repo_id,
        [CommitOperationAdd(name, data) for name, data in contents.items()],
        commit_message=message,
        revision=revision,
        parent_commit=head,
    )
    commit: str = made.oid
    return commit


def _names_of(data: bytes) -> tuple[str, str]:
    """What the Hub calls a file of these contents: as a git blob, and in large file storage."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return blob, hashlib.sha256(data).hexdigest()


def _patiently(attempt: Callable[[], T]) -> T:
    """Try again after a while, as long as waiting may help."""
    for wait in _WAITS:
        try:
            return attempt()
        except Exception as error:
            if not _passing(error):
                raise
        time.sleep(wait)
    return attempt()


def _passing(error: Exception) -> bool:
    """Whether it is the network, a busy Hub, or somebody else's commit in between (412)."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None:
        return _of_network(error)
    return status in (412, 429) or status >= 500


def _of_network(error: Exception) -> bool:
    # The client's transport is httpx or httpx2, whose errors have no base class in huggingface_hub.
    return type(error).__module__.startswith("httpx")


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Errors of the client in our words."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConnectionError(
            f"{repo_id} cannot be pushed while HF_HUB_OFFLINE is set; unset it"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = " ".join(str(error).split())
        if status in (401, 403, 404):
            raise PermissionError(
                f"{repo_id} cannot be written with this token; one with the right to write there "
                f"comes from `hf auth login` or token=. The Hub said: {reason:.300}"
            ) from error
        raise ConnectionError(f"{repo_id} was not pushed; the Hub said: {reason:.300}") from error
    except Exception as error:
        if not _of_network(error):
            raise
        raise ConnectionError(f"{repo_id} was not pushed, as the Hub cannot be reached") from error
