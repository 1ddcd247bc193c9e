"""Where a shared explainer is stored: a folder, or a repository on the Hugging Face Hub. It handles files only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from attrib_zoo.errors import CheckpointError, DataError, OptionError, listed, reason
from attrib_zoo.training.files import write_whole

EXPLAINER, CARD = "explainer.safetensors", "README.md"


def write_folder(folder: str | os.PathLike[str], explainer: bytes, card: str) -> Path:
    """Write both files, each completely or not at all; the folder is created if missing.

    Raises:
        DataError: it cannot be written.
    """
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_whole(target / EXPLAINER, explainer)
        write_whole(target / CARD, card)
    except OSError as error:
        raise DataError(
            f"folder: must be a folder that can be written, got {target} ({error.strerror}); make room, or choose "
            "another"
        ) from error
    return target


def upload(
    repo: str,
    explainer: bytes,
    card: str,
    *,
    message: str,
    private: bool | None,
    revision: str | None,
    token: str | bool | None,
    endpoint: str | None,
) -> str:
    """Create the repository if missing, and upload both files in one commit.

    Returns:
        The address of the commit.

    Raises:
        DataError: the Hub rejects it.
    """
    hub = _library()
    api = hub.HfApi(endpoint=endpoint, token=token, library_name="attrib_zoo")
    files = ((EXPLAINER, explainer), (CARD, card.encode()))
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        operations = [hub.CommitOperationAdd(name, data) for name, data in files]
        commit = api.create_commit(repo, operations, commit_message=message, revision=revision)
    except Exception as error:  # of the Hub's client, of its connection, of its checks of names
        raise DataError(
            f"repo: must be a repository that you may write to, such as 'you/name', got {repo!r} ({_said(error)}); "
            "log in with `hf auth login`, or pass token="
        ) from error
    return str(commit.commit_url)


def fetch(
    place: str | os.PathLike[str],
    *,
    revision: str | None,
    token: str | bool | None,
    endpoint: str | None,
    cache_dir: str | os.PathLike[str] | None,
) -> Path:
    """The explainer's file, from a folder or a repository.

    Raises:
        CheckpointError: there is none.
        OptionError: a revision is given for a folder.
    """
    folder = Path(place)
    if folder.is_dir():
        if revision is not None:
            raise OptionError(f"revision: belongs to repositories, and {folder} is a folder; leave it out")
        if not (folder / EXPLAINER).is_file():
            held = listed(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise CheckpointError(_without(f"folder {folder}", f"it holds {held}"))
        return folder / EXPLAINER
    repo = str(place)
    hub = _library()
    try:
        found = hub.hf_hub_download(
            repo, EXPLAINER, revision=revision, token=token, endpoint=endpoint, cache_dir=cache_dir,
            library_name="attrib_zoo",
        )  # fmt: skip
    except Exception as error:  # of the Hub's client, of its connection, of its checks of names
        raise CheckpointError(_unfetched(repo, revision, error)) from error
    return Path(found)


def _unfetched(repo: str, revision: str | None, error: Exception) -> str:
    kind = type(error).__name__
    if "EntryNotFound" in kind and "Local" not in kind:
        return _without(f"repository {repo}", f"it has none at revision {revision or 'main'}")
    if kind == "RevisionNotFoundError":
        return f"revision: must be a branch, a tag or a commit of {repo}, got {revision!r}; look at its list of commits"
    if kind == "HFValidationError":
        return f"repo_or_folder: must be a folder that exists, or a repository 'owner/name', got {repo!r}: mind it"
    if kind in ("RepositoryNotFoundError", "GatedRepoError"):
        return (
            f"repo_or_folder: must be a folder that exists, or a repository that you may read, got {repo!r} "
            f"({_said(error)}); look at its name, and where it is private log in with `hf auth login` or pass token="
        )
    return (
        f"repo_or_folder: {repo!r} is no folder, and could not be fetched from the Hub ({_said(error)}); look at the "
        "connection and at HF_ENDPOINT, or pass a folder"
    )


def _without(what: str, held: str) -> str:
    return (
        f"repo_or_folder: must hold {EXPLAINER}, but in the {what} is no explainer ({held}); save_pretrained and "
        "push_to_hub write one"
    )


def _said(error: BaseException) -> str:
    return reason(error).strip() or type(error).__name__


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise OptionError(
            "repo: needs the package huggingface_hub: pip install 'attrib_zoo[hub]'; a folder needs nothing"
        ) from error
    return huggingface_hub
