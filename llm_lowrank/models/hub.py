"""The Hugging Face hub as a place for results: what is found out before a run, and the upload of a folder.

The token is the one that huggingface_hub finds: HF_TOKEN, or the file that `hf auth login` wrote. HF_ENDPOINT names
another hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

MERGED = "-merged"  # ends the name of the repository of the merged model
# Of an earlier upload they could be read in the place of the new weights, where these have other names.
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


def repositories(name: str, merged: bool) -> list[str]:
    """The repositories of a run: the one of the adapter, and that of the merged model if there is one."""
    return [name, *([f"{name}{MERGED}"] if merged else [])]


def name_errors(name: str, merged: bool) -> list[str]:
    """What is wrong with the name of a repository, so that the hub would refuse it."""
    try:
        for each in repositories(name, merged):
            validate_repo_id(each)
    except HFValidationError as error:
        return [f"hub_model_id: {name} cannot be the name of a repository: {error}"]
    return []


def open_repositories(names: Sequence[str], private: bool | None) -> list[str]:
    """Create the repositories that are not there, and return all names with their owner.

    private: whether a repository that is created is private; None: as its owner has set it. ValueError if there is no
    token, if it may not write there, or if a repository that shall be private is public.
    """
    api = HfApi()
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            "push_to_hub: HF_HUB_OFFLINE is set, so that nothing can be uploaded; unset it, or train without "
            "push_to_hub and upload later with llm-lowrank push"
        )
    if get_token() is None:
        raise ValueError("push_to_hub: there is no token for the hub; set HF_TOKEN, or run hf auth login")
    try:
        api.whoami()
    except Exception as error:  # of the network, of httpx or of the hub
        raise ValueError(f"push_to_hub: {api.endpoint} does not take the token: {_reason(error)}") from error
    full = []
    for name in names:
        try:
            found = api.create_repo(name, private=private, exist_ok=True).repo_id
            api.auth_check(found, write=True)
            public = private is True and not api.model_info(found).private
        except Exception as error:
            raise ValueError(
                f"hub_model_id: {name} cannot be created on {api.endpoint}, or not written: {_reason(error)} The "
                "token needs the right to write, and the name an owner that it may write for"
            ) from error
        if public:
            raise ValueError(
                f"hub_private_repo: {found} is there already and is public; make it private on the hub, or take "
                "another hub_model_id"
            )
        full.append(found)
    return full


def upload(folder: Path, name: str) -> str:
    """Upload a folder into a repository, in the place of weights that are there, and return the address.

    ValueError if that fails; the folder stays as it is.
    """
    api = HfApi()
    try:
        api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Upload by llm-lowrank", delete_patterns=WEIGHTS
        )
    except Exception as error:
        raise ValueError(f"{folder} was not uploaded to {name}: {_reason(error)}") from error
    return f"{api.endpoint}/{name}"


def _reason(error: Exception) -> str:
    """What failed, in the first line of an error, and what the hub says about it, in the last one."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return f"{'. '.join(dict.fromkeys([lines[0], lines[-1]]))}." if lines else f"{type(error).__name__}."
