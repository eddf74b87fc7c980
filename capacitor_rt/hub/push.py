"""`push_to_hub`: a finished cache as a dataset, a saved model as a model, in commits that can be gone on with.

Files go up in groups, a commit each, and what says that a folder is whole goes up last: a reader of a push that was cut
short finds no `plan.json`. The same push again uploads what is missing. A file that is there with other contents is not
ours: it is refused unless it is to be replaced, and then stays in the repository's history.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..errors import CacheError, CapacitorError, CheckpointError, InputError
from ..hub_access import unreachable
from ..printable import counted
from ..version import __version__
from .cards import cache_card, model_card

CARD = "README.md"
PLAN = "plan.json"
GROUP_FILES = 100
GROUP_BYTES = 4 << 30

Advance = Callable[[str, int, int], None]


class HubError(CapacitorError):
    """The hub refuses, or cannot be reached."""


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        url: of the repository.
        kind: "dataset" or "model".
        uploaded: names of the files that were sent.
        unchanged: names of the files that were there already.
    """

    url: str
    kind: str
    uploaded: tuple[str, ...]
    unchanged: tuple[str, ...]


@dataclass(frozen=True)
class _Folder:
    """What is to be pushed: names in the repository and their files (or bytes), in the order of the commits."""

    kind: str
    files: dict[str, Path | bytes]
    last: frozenset[str]


def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    overwrite: bool = False,
    advance: Advance = lambda what, done, total: None,
) -> Pushed:
    """Upload a cache (as a dataset) or a folder of `save_pretrained` (as a model), with a generated card.

    A cache is verified first, every byte of it. Only its own files go up; `README.md` is the folder's if it has one,
    else the repository's if it has one, else generated.

    Args:
        folder: of a finished cache, or with `config.json` and `model.safetensors`.
        repo_id: `owner/name`; made if it is not there.
        private: of a repository that is made.
        revision: branch, made from "main" if it is not there; "main" when None.
        token: as in `huggingface_hub`.
        overwrite: replace files that are there with other contents.
        advance: told ("verify" or "upload", files done, files in all).

    Raises:
        CacheError: the cache is unfinished or damaged. CheckpointError: the model does not fit together.
        InputError: the folder is neither; the repository holds other files by the same names.
        HubError: no access, no such owner, not reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub_errors

    root = Path(folder)
    content = _content(root, repo_id, revision, advance)
    why = unreachable()
    if why:
        raise HubError(f"{repo_id} could not be pushed to: {why}")
    api = HfApi(token=token, library_name="capacitor_rt", library_version=__version__)
    try:
        url = api.create_repo(repo_id, repo_type=content.kind, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo_id, branch=revision, repo_type=content.kind, exist_ok=True)
        tree = api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type=content.kind)
        # folders have no size
        there = {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}
        if isinstance(content.files[CARD], bytes) and CARD in there:
            del content.files[CARD]
        todo, unchanged = _missing(content, there, repo_id, overwrite)
        done = len(unchanged)
        advance("upload", done, done + len(todo))
        for group in _groups(content, todo):
            _commit(api, content, group, repo_id, revision)
            done += len(group)
            advance("upload", done, len(unchanged) + len(todo))
    except CapacitorError:
        raise
    except hub_errors.HFValidationError as error:
        raise InputError(f"{repo_id!r} is no name of a repository: {error}") from error
    except (hub_errors.HfHubHTTPError, hub_errors.OfflineModeIsEnabled, OSError, RuntimeError, ValueError) as error:
        raise HubError(_explain(repo_id, error)) from error
    except Exception as error:
        # what an HTTP client raises that does not reach the hub differs from version to version
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise
        raise HubError(_explain(repo_id, error)) from error
    return Pushed(str(url), content.kind, tuple(todo), tuple(unchanged))


def _content(root: Path, repo_id: str, revision: str | None, advance: Advance) -> _Folder:
    if not root.is_dir():
        raise InputError(f"{str(root)!r} is no folder: give a cache, or a folder of save_pretrained")
    if (root / PLAN).exists():
        content = _cache(root, repo_id, revision, advance)
    elif (root / checkpoint.WEIGHTS_NAME).exists():
        content = _model(root, repo_id, revision)
    else:
        from ..cache.views import views_in

        if several := [path.name for path in views_in(root)]:
            raise InputError(f"{root} holds the caches {', '.join(several)}: push each by itself")
        raise InputError(
            f"{root} holds neither {PLAN} nor {checkpoint.WEIGHTS_NAME}: give a cache, or a folder of save_pretrained"
        )
    if (root / CARD).is_file():
        content.files[CARD] = root / CARD
    return content


def _cache(root: Path, repo_id: str, revision: str | None, advance: Advance) -> _Folder:
    from ..cache.dataset import LatentDataset
    from ..cache.verify import verify

    found = verify(root, advance=lambda done, total: advance("verify", done, total))
    if found.problems:
        count = len(found.problems)
        raise CacheError(f"{root} is damaged, and is not pushed ({counted(count, 'problem')})", found.problems[:5])
    if found.unfinished:
        raise CacheError(
            f"{root} is not finished, and is not pushed: {found.unfinished} parts are missing; run the cache command "
            "again"
        )
    card = cache_card(LatentDataset(root), found, repo_id, revision)
    files: dict[str, Path | bytes] = {name: root / name for name in found.files}
    # without these a folder is no cache
    last = frozenset(name for name in files if "/" not in name) | {CARD}
    return _Folder("dataset", files | {CARD: card.encode()}, last)


def _model(root: Path, repo_id: str, revision: str | None) -> _Folder:
    source = checkpoint.resolve(root)
    reading, problems = checkpoint.problems_of(source)
    if problems:
        raise CheckpointError(
            f"{root} does not fit together, and is not pushed ({counted(len(problems), 'problem')}):", problems
        )
    shapes = {entry.name: entry.shape for entry in reading.entries}
    adapter = None
    if (root / checkpoint.ADAPTER_NAME).is_file():
        from ..adapters import settings

        adapter, _ = settings.document(root / checkpoint.ADAPTER_NAME)
    card = model_card(reading.config, shapes, repo_id, revision, adapter)
    names = [checkpoint.CONFIG_NAME, checkpoint.ADAPTER_NAME, checkpoint.WEIGHTS_NAME]
    files: dict[str, Path | bytes] = {name: root / name for name in names if (root / name).is_file()}
    return _Folder("model", files | {CARD: card.encode()}, frozenset())


def _missing(content: _Folder, there: dict[str, Any], repo_id: str, overwrite: bool) -> tuple[list[str], list[str]]:
    """Names that are to be uploaded, and names whose contents are there.

    Raises:
        InputError: names that are there with other contents, unless they may be replaced.
    """
    todo, unchanged, others = [], [], []
    for name, data in content.files.items():
        if name not in there:
            todo.append(name)
        elif _is_same(data, there[name]):
            unchanged.append(name)
        else:
            others.append(name)
    if others and not overwrite:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise InputError(
            f"{repo_id} holds other files by the same names ({shown}): push to another repository, or pass "
            "--overwrite, which leaves the old ones in its history"
        )
    return todo + others, unchanged


def _is_same(data: Path | bytes, entry: Any) -> bool:
    """Whether a file of a repository has these contents."""
    size = len(data) if isinstance(data, bytes) else data.stat().st_size
    if size != entry.size:
        return False
    digest = hashlib.sha256() if entry.lfs is not None else hashlib.sha1(b"blob %d\0" % size)
    for chunk in _chunks(data):
        digest.update(chunk)
    return digest.hexdigest() == (entry.lfs.sha256 if entry.lfs is not None else entry.blob_id)


def _chunks(data: Path | bytes) -> Iterator[bytes]:
    if isinstance(data, bytes):
        yield data
        return
    with open(data, "rb") as file:
        while chunk := file.read(1 << 20):
            yield chunk


def _groups(content: _Folder, names: list[str]) -> Iterator[list[str]]:
    """Names of one commit each; what is to come last, last and together."""
    group: list[str] = []
    size = 0
    for name in names:
        if name in content.last:
            continue
        data = content.files[name]
        nbytes = len(data) if isinstance(data, bytes) else data.stat().st_size
        if group and (len(group) == GROUP_FILES or size + nbytes > GROUP_BYTES):
            yield group
            group, size = [], 0
        group.append(name)
        size += nbytes
    if group:
        yield group
    ending = [name for name in names if name in content.last]
    if ending:
        yield ending


def _commit(api: Any, content: _Folder, names: list[str], repo_id: str, revision: str | None) -> None:
    from huggingface_hub import CommitOperationAdd

    operations = []
    for name in names:
        data = content.files[name]
        operations.append(CommitOperationAdd(name, data if isinstance(data, bytes) else str(data)))
    first = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    api.create_commit(
        repo_id,
        operations,
        commit_message=f"capacitor-rt: {first}",
        repo_type=content.kind,
        revision=revision,
    )


def _explain(repo_id: str, error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the hub does not let you write to {repo_id}: log in by `hf auth login`, or pass a token that may write"
    if type(error).__name__ == "OfflineModeIsEnabled":
        return f"{repo_id} cannot be pushed to: HF_HUB_OFFLINE is set"
    cause = error.__cause__ or error
    reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    return f"{repo_id} could not be pushed to ({reason}): what arrived is kept, the same push goes on from there"
