"""Which files a name stands for: a file, a folder, a URL of fsspec, or a dataset of the hub; with subsets and splits.

    name --find--> Found: split -> names of files --Found.files--> [File, ...]

The README of a folder (as on the hub) says which files a subset and a split have. Without that the names of folders and
files decide, by the rules of the hub: SPLITS, set off by one of "-._ " or a digit; data/SPLIT-00000-of-00001.*; and all
files are train where no name says anything. Hidden files, and folders that begin with __, are left out. A folder that
Dataset.save_to_disk or DatasetDict.save_to_disk wrote says itself which files it has.
"""

import fnmatch
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import yaml
from filelock import FileLock
from fsspec.utils import glob_translate
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llm_lowrank.data.reading import COMPRESSED, KINDS, File, kind_of
from llm_lowrank.numerics.files import cache_dir, writable_folder, write_aside

SPLITS = {  # split -> the words for it in the names of folders and files
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
CARD = "README.md"
STATE = "state.json"  # in a folder that Dataset.save_to_disk wrote
SPLITS_OF = "dataset_dict.json"  # in a folder that DatasetDict.save_to_disk wrote
NO_ROWS = ("config.json", "dataset_info.json", "dataset_infos.json", STATE, SPLITS_OF)  # what other programs leave
CARD_KEYS = {"config_name", "data_files", "data_dir", "default", "description", "version", "features", "drop_labels"}
SEPARATORS = ("sep", "delimiter")
EXPORT = "refs/convert/parquet"  # branch in which the hub has a dataset as Parquet, in folders SUBSET/SPLIT
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(?!\d).*")
_ENDINGS = re.compile(f"({'|'.join(map(re.escape, KINDS))})?({'|'.join(map(re.escape, COMPRESSED))})?$")
VERSIONS = ("etag", "mtime", "lastmodified", "last_modified", "created", "updated", "md5hash", "generation", "blob_id")


@dataclass(frozen=True)
class Folder:
    """Names of files below one root, or one file, which has the name ""."""

    name: str  # as messages give it
    names: tuple[str, ...]  # relative to the root, with /
    path: Callable[[str], str]  # from such a name to a path or URL to read from; it may download the file

    def text(self, name: str) -> str:
        """Return what a text file says."""
        with File(name, self.path(name)).open() as stream:
            return stream.read().decode("utf-8-sig", errors="replace")

    def below(self, top: str) -> tuple[str, ...]:
        """Return the names in a folder of this folder."""
        return tuple(name for name in self.names if PurePosixPath(name).is_relative_to(top)) if top else self.names


@dataclass(frozen=True)
class Found:
    """The files of each split."""

    folder: Folder
    splits: dict[str, list[str]]
    separator: str = ""  # of the cells of tables of text; empty: by the name

    def files(self, split: str) -> list[File]:
        """Return the files of a split, downloaded if they have to be. ValueError if the split cannot be read."""
        name = self.folder.name
        if split not in self.splits:
            raise ValueError(f"{name} has no split {split!r}; it has {', '.join(sorted(self.splits))}")
        kinds = sorted({kind_of(file or name) for file in self.splits[split]})
        if len(kinds) > 1:
            raise ValueError(
                f"data.dataset: the folder {name} holds both {' and '.join(kinds)} files; give a folder with files of "
                "one kind, or the files themselves"
            )
        stems: dict[str, str] = {}
        for file in self.splits[split]:
            stem = re.sub(_ENDINGS, "", file.lower())
            if stem in stems:
                raise ValueError(
                    f"data.dataset: in the folder {name}, {stems[stem]} and {file} look like one file in two forms, "
                    "whose rows would be trained twice; remove one of them, or name the files themselves"
                )
            stems[stem] = file
        return [
            File(f"{name}/{file}" if file else name, self.folder.path(file), self.separator)
            for file in self.splits[split]
        ]


def find(name: str, *, hub: bool = False, subset: str = "", revision: str = "", streaming: bool = False) -> Found:
    """Return the files that a name stands for. hub: the name is not looked for on disk.

    ValueError if there is no such place, if it holds no files that can be read, or if a setting does not fit it.
    """
    local = Path(name).expanduser()
    if "://" in name:
        folder = _remote(name, streaming)
    elif local.exists() and not hub:
        folder = _local(name, local)
    elif not hub and (kind_of(name) or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"data.dataset: no such file or folder: {name}")
    else:
        return _splits(_hub(name, revision, streaming), subset, by_the_hub=True, export=revision == EXPORT)
    if revision:
        raise ValueError(f"data.revision is for datasets of the hub and {name} would ignore it; remove it")
    if folder.names != ("",):
        return _splits(folder, subset)
    if subset:
        raise ValueError(f"data.subset is for datasets of the hub and {name} would ignore it; remove it")
    if not kind_of(name):
        raise ValueError(
            f"data.dataset: {name} is not a {', '.join(KINDS)} file (the text ones may end in {', '.join(COMPRESSED)}, "
            "too); convert it to one of them"
        )
    return Found(folder, {"train": [""]})


# --- places -----------------------------------------------------------------------------------------------------------


def _visible(name: str) -> bool:
    return not any(part.startswith((".", "__")) for part in PurePosixPath(name).parts)


def _local(name: str, path: Path) -> Folder:
    if not path.is_dir():
        return Folder(name, ("",), lambda _: str(path))
    names = []
    for file in path.rglob("*"):
        relative = file.relative_to(path).as_posix()
        if file.is_symlink() and not file.exists():
            raise ValueError(f"data.dataset: {name}/{relative} is a link to a file that is gone; mend or remove it")
        if file.is_symlink() and file.is_dir() and _visible(relative):
            raise ValueError(
                f"data.dataset: {name}/{relative} is a link to a folder, and such links are not followed; name that "
                "folder itself, as one of several datasets, or replace the link by links to its files"
            )
        if file.is_file() and _visible(relative):
            names.append(relative)
    return Folder(name.rstrip("/"), tuple(sorted(names)), lambda relative: str(path / relative))


def _remote(name: str, streaming: bool) -> Folder:
    """Return the files at a URL of fsspec. Without streaming they are copied to the cache when they are read."""
    protocol = name.partition("://")[0]
    try:
        system, root = fsspec.core.url_to_fs(name)
        if system.isfile(root):
            names: tuple[str, ...] = ("",)
        else:
            start = f"{root.rstrip('/')}/"
            names = tuple(sorted(file.removeprefix(start) for file in system.find(root)))
    except ImportError as error:
        raise ValueError(f"data.dataset: {name} needs a package: {error}") from error
    except Exception as error:  # the packages of the protocols raise what they like
        raise ValueError(
            f"data.dataset: cannot read {name} ({_first_line(error)}); check the address and the credentials of "
            f"{protocol}, or copy the data to a disk"
        ) from error
    if not names:
        raise ValueError(f"data.dataset: no such file or folder: {name}")

    def path(relative: str) -> str:
        full = f"{root.rstrip('/')}/{relative}" if relative else root
        return str(system.unstrip_protocol(full)) if streaming else str(_fetched(system, full))

    return Folder(name.rstrip("/"), tuple(filter(_visible, names)), path)


def _fetched(system: Any, path: str) -> Path:
    """Return the copy of a remote file in the cache; one process of a node makes it while the others wait."""
    try:
        info = system.info(path)
        key = sha256(f"{system.unstrip_protocol(path)} {sorted(info.items(), key=str)}".encode()).hexdigest()[:32]
        # without a mark of the version a change of the file could not be seen
        versioned = any(str(name).lower() in VERSIONS and value for name, value in info.items())
        folder = writable_folder(cache_dir() / "files" / key)
        copy = folder / PurePosixPath(path).name
        with FileLock(folder / "lock"):
            if not (versioned and copy.is_file()):
                with write_aside(copy) as aside:
                    system.get_file(path, str(aside))
        return copy
    except Exception as error:  # the packages of the protocols raise what they like
        raise ValueError(f"data.dataset: cannot read {path} ({_first_line(error)}); try again") from error


def _hub(name: str, revision: str, streaming: bool) -> Folder:
    """Return the files of a dataset of the hub; without a network those that the cache of the hub has."""
    at = f"{name}, revision {revision}" if revision else name
    try:
        info = HfApi().dataset_info(name, revision=revision or None)
    except GatedRepoError as error:
        raise ValueError(f"{at}: accept its conditions on the hub and log in: hf auth login, or HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{name} has no data.revision {revision!r}; give a branch, a tag or a commit of it") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"{name} is no file or folder here and no dataset of the hub that can be seen; check the name, and log in "
            "if it is private: hf auth login, or HF_TOKEN"
        ) from error
    except Exception as error:  # of the HTTP library that the hub's client uses: no network
        return _from_the_hubs_cache(name, at, revision, error)
    names = tuple(sorted(file.rfilename for file in info.siblings or () if _visible(file.rfilename)))
    if streaming:
        return Folder(name, names, lambda relative: f"hf://datasets/{name}@{info.sha}/{relative}")

    def path(relative: str) -> str:
        try:
            # with the revision as it was given the cache learns which commit it is, for when there is no network
            snapshot_download(name, repo_type="dataset", revision=revision or None, allow_patterns=[])
            return hf_hub_download(name, relative, repo_type="dataset", revision=info.sha)
        except Exception as error:  # of the HTTP library, or of the disk
            raise ValueError(
                f"{name}/{relative} cannot be downloaded to {constants.HF_HUB_CACHE} ({_first_line(error)}); try "
                "again, or set HF_HOME to a folder that can be written"
            ) from error

    return Folder(name, names, path)


def _from_the_hubs_cache(name: str, at: str, revision: str, reason: Exception) -> Folder:
    try:
        root = snapshot_download(name, repo_type="dataset", revision=revision or None, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{at} is no file or folder here, the hub cannot be reached ({_first_line(reason)}) and its cache "
            f"{constants.HF_HUB_CACHE} has no such dataset; where there is a network, run: hf download --repo-type "
            f"dataset {name}; HF_HOME names the cache"
        ) from error
    folder = _local(name, Path(root))
    numbers: dict[tuple[str, str], set[str]] = {}
    for file in folder.names:
        if shard := SHARD.fullmatch(file):
            numbers.setdefault((shard[1], shard[3]), set()).add(shard[2])
    for (stem, count), there in numbers.items():
        if len(there) != int(count):
            raise ValueError(
                f"{at}: the hub cannot be reached, and its cache {root} has only {len(there)} of the {int(count)} "
                f"files {stem}-*; where there is a network, run: hf download --repo-type dataset {name}"
            )
    return folder


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# --- subsets and splits -----------------------------------------------------------------------------------------------


def _splits(folder: Folder, subset: str, *, by_the_hub: bool = False, export: bool = False) -> Found:
    """Return the files of each split of a subset; empty: the only or the default one."""
    if SPLITS_OF in folder.names or STATE in folder.names:
        if subset:
            raise ValueError(f"data.subset: {folder.name} was written by save_to_disk and has no subsets; remove it")
        return Found(folder, _saved(folder))
    configs = _card(folder)
    if configs:
        config = configs[_chosen(folder.name, list(configs), subset, default=_default(configs))]
        unknown = [key for key in config if key not in CARD_KEYS and key not in SEPARATORS]
        if unknown:
            raise ValueError(
                f"{folder.name}/{CARD}: {', '.join(unknown)} of a subset is not read; convert the data to .jsonl"
            )
        separator = next((str(config[key]) for key in SEPARATORS if config.get(key)), "")
        top = str(config.get("data_dir") or "").strip("/")
        if "data_files" in config:
            return Found(folder, _by_patterns(folder, config["data_files"], top), separator)
        return Found(folder, _by_names(folder, folder.below(top), by_the_hub), separator)
    if export:
        tops = sorted({PurePosixPath(name).parts[0] for name in folder.names if "/" in name})
        return Found(folder, _by_names(folder, folder.below(_chosen(folder.name, tops, subset)), by_the_hub))
    if subset:
        raise ValueError(f"data.subset: {folder.name} has no subsets; remove it")
    return Found(folder, _by_names(folder, folder.names, by_the_hub))


def _chosen(name: str, subsets: Sequence[str], wanted: str, default: str = "") -> str:
    """Return the subset to read. ValueError if it does not exist, or if one has to be chosen."""
    if wanted and wanted not in subsets:
        raise ValueError(f"data.subset: {name} has no subset {wanted!r}; it has {', '.join(subsets)}")
    if not wanted and not default and len(subsets) > 1:
        raise ValueError(f"{name} has the subsets {', '.join(subsets)}; choose one with data.subset")
    return wanted or default or subsets[0]


def _default(configs: dict[str, dict[str, Any]]) -> str:
    marked = [name for name, config in configs.items() if config.get("default")]
    return marked[0] if marked else "default" if "default" in configs else ""


def _card(folder: Folder) -> dict[str, dict[str, Any]]:
    """Return the subsets that the README of a folder lists at its head, by their names."""
    header = re.match(r"\s*---\r?\n(.*?)\r?\n---", folder.text(CARD), re.DOTALL) if CARD in folder.names else None
    try:
        content = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError as error:
        raise ValueError(
            f"{folder.name}/{CARD}: its YAML head cannot be read ({_first_line(error)}); mend it"
        ) from error
    configs = content.get("configs") if isinstance(content, dict) else None
    return {str(config["config_name"]): config for config in configs or () if config.get("config_name")}


def _by_patterns(folder: Folder, wanted: Any, top: str) -> dict[str, list[str]]:
    """Return the files of each split that a README lists: a pattern, patterns, or {split, path} entries."""
    entries = wanted if isinstance(wanted, list) else [wanted]
    if not all(isinstance(entry, dict) for entry in entries):
        entries = [{"split": "train", "path": entries}]
    splits: dict[str, list[str]] = {}
    for entry in entries:
        paths = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
        names: dict[str, None] = {}
        for path in paths:
            pattern = glob_translate(str(PurePosixPath(top) / str(path)))
            matched = [name for name in folder.names if re.match(pattern, name)]
            if not matched:
                raise ValueError(f"{folder.name}: {CARD} lists {path} for the split {entry['split']}, which is absent")
            names |= dict.fromkeys(matched)
        splits.setdefault(str(entry["split"]), []).extend(_with_rows(folder.name, names))
    return splits


def _with_rows(place: str, names: Any) -> list[str]:
    """Return the files that hold rows. ValueError if there are none."""
    files = [name for name in names if kind_of(name) and PurePosixPath(name).name not in NO_ROWS]
    if not files:
        others = ", ".join(sorted({PurePosixPath(name).suffix for name in names if PurePosixPath(name).suffix})[:5])
        raise ValueError(
            f"data.dataset: the folder {place} holds no {', '.join(KINDS)} file{f' (but {others})' if others else ''}; "
            f"convert the data to one of them; some datasets of the hub can be read with data.revision: {EXPORT}"
        )
    return files


def _by_names(folder: Folder, names: Sequence[str], by_the_hub: bool) -> dict[str, list[str]]:
    """Return the files of each split as the names of folders and files say."""
    files = _with_rows(folder.name, names)
    shards = [(name, SHARD.fullmatch(name)) for name in files if fnmatch.fnmatch(name, "data/*")]
    splits: dict[str, list[str]] = {}
    for name, shard in shards:
        if shard and "/" not in (split := shard[1].removeprefix("data/")):
            splits.setdefault(split, []).append(name)
    for parts in (lambda name: PurePosixPath(name).parts[:-1], lambda name: PurePosixPath(name).parts[-1:]):
        if not splits:
            for split, words in SPLITS.items():
                word = re.compile(rf"(?:^|[-._ 0-9])(?:{'|'.join(words)})(?:$|[-._ 0-9])")
                if chosen := [name for name in files if any(word.search(part) for part in parts(name))]:
                    splits[split] = chosen
    left = sorted(set(files).difference(*splits.values())) if splits else []
    if left and not by_the_hub:
        raise ValueError(
            f"data.dataset: the names in the folder {folder.name} say the split of some files and not that of "
            f"{', '.join(left[:5])}; move these away, or name the files themselves"
        )
    return splits or {"train": files}


def _saved(folder: Folder, top: str = "") -> dict[str, list[str]]:
    """Return the files of each split of a folder that save_to_disk wrote."""
    try:
        if SPLITS_OF in folder.names and not top:
            wanted = json.loads(folder.text(SPLITS_OF))["splits"]
            return {split: _saved(folder, f"{split}/")["train"] for split in wanted}
        state = json.loads(folder.text(f"{top}{STATE}"))
        files = [f"{top}{file['filename']}" for file in state["_data_files"]]
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(
            f"data.dataset: {folder.name} was written by save_to_disk and is not whole ({type(error).__name__}: {error}"
            "); save it again"
        ) from error
    gone = [file for file in files if file not in folder.names]
    if gone or state.get("_indices_files") or state.get("_indices_data_files"):
        why = f"{gone[0]} is absent" if gone else "it is a selection of rows, which old versions of datasets wrote"
        raise ValueError(f"data.dataset: {folder.name} cannot be read: {why}; save it again with save_to_disk")
    return {"train": files, **({state["_split"]: files} if state.get("_split") else {})}
