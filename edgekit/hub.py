"""Fetches the files of a model that a conversion needs from a Hugging Face hub, into the hub library's own cache.

Knows which files those are and what to say when it fails; knows nothing of what is in them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

from edgekit.errors import CorruptCheckpoint, DownloadFailed, UnsupportedModel
from edgekit.units import Progress, silent

_ID = re.compile(
    r"(?:https://huggingface\.co/|hf://)?"
    r"(?P<repo>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)"
    r"(?:(?:@|/tree/)(?P<revision>[\w./-]+))?/?"
)
_SMALL = re.compile(
    r"(?:config|generation_config|adapter_config|hf_quant_config|special_tokens_map|added_tokens)\.json"
    r"|(?:tokenizer|chat_template|vocab).*\.(?:json|jinja|txt|model)|additional_chat_templates/[\w.-]+\.jinja"
    r"|[\w.-]+\.model|merges\.txt|README\.md"
    r"|modules\.json|(?:sentence_bert_config|config_sentence_transformers)\.json|[\w.-]+_Pooling/config\.json"
)
_SHARD = re.compile(r"[\w.-]+-\d{5}-of-\d{5}\.safetensors")
Check = Callable[[Path, set[str]], None]
"""Called with the folder in the cache and the names of all files at the top of the repository."""

_INDEX = "model.safetensors.index.json"


def parse_id(ref: str) -> tuple[str, str | None] | None:
    """(`org/name`, revision or None) of a hub id or a huggingface.co address; None if `ref` is neither."""
    match = _ID.fullmatch(ref)
    if not match or match["repo"].endswith((".gguf", ".safetensors", ".json", ".bin")):
        return None
    return match["repo"], match["revision"]


def download(
    repo: str,
    revision: str | None = None,
    *,
    progress: Progress = silent,
    check: Check | None = None,
) -> Path:
    """The folder of `repo` in the cache, with every file that a conversion needs.

    Small files come first; `check` may then refuse the model before its weights are fetched. A dropped connection is
    resumed where it broke; files that are complete are never fetched again. Without a network, or with
    HF_HUB_OFFLINE, the cached folder is taken. HF_ENDPOINT, HF_TOKEN and HF_HOME mean what they mean to the hub
    library. Raises DownloadFailed, and UnsupportedModel where there are no safetensors.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        sizes = {s.rfilename: s.size or 0 for s in info.siblings or []}
        root = _fetch(repo, str(info.sha), sizes, progress, check)
        _remember(root, revision or "main")
        return root
    except HFValidationError as e:
        raise DownloadFailed(f"{repo!r} is not a hub id: {e}", "write it like org/name or org/name@revision") from None
    except _failures() as e:
        cached = None if _is_refusal(e) else _cached(repo, revision)
        if cached:
            return cached
        raise _failure(repo, revision, e) from None


def _failures() -> tuple[type[Exception], ...]:
    """What the hub library and the transfer libraries below it raise when a fetch fails."""
    from huggingface_hub import errors

    # httpx's own HTTPError: which module that lies in changes with the hub library's version
    network = cast("type[Exception]", errors.HfHubHTTPError.__mro__[1])
    xet = getattr(errors, "XetDownloadError", RuntimeError)  # hf_xet itself raises bare RuntimeErrors
    return network, OSError, RuntimeError, xet


def _fetch(repo: str, commit: str, sizes: dict[str, int], progress: Progress, check: Check | None) -> Path:
    small = sorted(name for name in sizes if _SMALL.fullmatch(name))
    bytes_ = _Bytes(f"download {repo}", progress, sizes)
    root = _fetch_files(repo, commit, small, bytes_)
    if root is None:
        raise UnsupportedModel(f"{repo} holds no model: no config.json among {len(sizes)} files")
    if check:
        check(root, {n for n in sizes if "/" not in n})
    weights = _weights(repo, commit, sizes, bytes_)
    bytes_.expect(small + weights)
    _fetch_files(repo, commit, weights, bytes_)
    return root


def _remember(root: Path, revision: str) -> None:
    """Note in the cache which commit `revision` is, as the hub library does; only now that every file is there."""
    if revision == root.name or ".." in Path(revision).parts:
        return
    ref = root.parent.parent / "refs" / revision
    with contextlib.suppress(OSError):  # a cache that others write and we may only read
        ref.parent.mkdir(parents=True, exist_ok=True)
        beside = ref.with_name(f"{ref.name}.{os.getpid()}")
        beside.write_text(root.name)
        beside.replace(ref)


def _fetch_files(repo: str, commit: str, names: Iterable[str], bytes_: _Bytes) -> Path | None:
    from huggingface_hub import hf_hub_download

    root = None
    # one after the other: an interrupt takes effect at once, and the hub's own transfer is parallel within a file
    for name in names:
        path = hf_hub_download(repo, name, revision=commit, tqdm_class=bytes_.bar())
        bytes_.finished(name)
        if "/" not in name:
            root = Path(path).parent
    return root


def _weights(repo: str, commit: str, sizes: dict[str, int], bytes_: _Bytes) -> list[str]:
    """Names of the weight files: the one file, or the shards that the index names, or all there are."""
    found = sorted(n for n in sizes if n.endswith(".safetensors") and "/" not in n and n != "adapter_model.safetensors")
    if "model.safetensors" in found:
        return ["model.safetensors"]
    if not found:
        raise UnsupportedModel(f"{repo} has no *.safetensors file", "name a repository with the model's weights")
    if _INDEX not in sizes:
        return [n for n in found if _SHARD.fullmatch(n)] or found
    root = _fetch_files(repo, commit, [_INDEX], bytes_)
    assert root
    try:
        shards = set(json.loads((root / _INDEX).read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CorruptCheckpoint(f"{root / _INDEX}: no weight_map in it") from None
    if missing := sorted(map(str, shards - set(found))):
        raise CorruptCheckpoint(f"{repo}: the index names {missing[0]}, which the repository does not have")
    return [_INDEX, *sorted(shards)]


class _Bytes:
    """Turns what the hub library tells its progress bars into (task, done, total) bytes over all files."""

    def __init__(self, task: str, progress: Progress, sizes: dict[str, int]) -> None:
        self.task, self.progress, self.sizes = task, progress, sizes
        self.done = self.current = self.total = 0
        self.seen: set[str] = set()

    def expect(self, names: Iterable[str]) -> None:
        self.total = sum(self.sizes[n] for n in names)

    def add(self, count: int) -> None:
        self.current += count
        self._show()

    def finished(self, name: str) -> None:
        """`name` is there: count it whole, whether it was fetched, resumed or cached."""
        if name not in self.seen:
            self.seen.add(name)
            self.done += self.sizes.get(name, 0)
        self.current = 0
        self._show()

    def _show(self) -> None:
        if self.total:  # known once the small files are there
            self.progress(self.task, min(self.done + self.current, self.total), self.total)

    def bar(self) -> type[Any]:
        """A class with as much of tqdm as the hub library asks of one."""
        add = self.add

        class Bar:
            def __init__(self, *_: object, total: int | None = None, initial: int = 0, **__: object) -> None:
                self.n, self.total = initial, total
                add(initial)

            def update(self, n: float | None = 1) -> None:
                self.n += int(n or 0)
                add(int(n or 0))

            def ignore(self, *_: object, **__: object) -> None:
                pass

            update_transfer = set_postfix_str = set_transfer_postfix_str = ignore
            set_description = set_description_str = refresh = reset = close = ignore

            def __enter__(self) -> Bar:
                return self

            def __exit__(self, *_: object) -> None:
                pass

        return Bar


def _cached(repo: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo, "config.json", revision=revision)
    return Path(path).parent if isinstance(path, str) else None


def _is_refusal(error: Exception) -> bool:
    """Whether the hub itself said no: then a cached copy is not what was asked for."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return status in {401, 403, 404} or getattr(error, "errno", None) in {errno.ENOSPC, errno.EACCES, errno.EROFS}


def _failure(repo: str, revision: str | None, error: Exception) -> DownloadFailed:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, errors.GatedRepoError):
        return DownloadFailed(
            f"{repo} is gated: the hub wants its licence accepted",
            f"accept the licence at {page}, then: export HF_TOKEN=hf_... (from {constants.ENDPOINT}/settings/tokens)",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return DownloadFailed(f"{repo} has no revision {revision!r}", f"branches and tags: {page}/tree/main")
    if isinstance(error, errors.RepositoryNotFoundError):
        return DownloadFailed(
            f"no model {repo!r} on {constants.ENDPOINT}, or it is private",
            "check the spelling; for a private model: export HF_TOKEN=hf_...",
        )
    if status in {401, 403}:
        return DownloadFailed(
            f"the hub refused access to {repo} ({status})",
            f"see {page}; the token in HF_TOKEN may be wrong, expired or without the right to read it",
        )
    offline = isinstance(_root_cause(error), errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE
    if offline:
        return DownloadFailed(f"{repo} is not in the cache, and HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
    number = getattr(error, "errno", None)
    if number in {errno.ENOSPC, errno.EACCES, errno.EROFS}:
        reason = getattr(error, "strerror", None) or str(error)
        return DownloadFailed(
            f"cannot store {repo} in {constants.HF_HUB_CACHE}: {reason}", "export HF_HOME=/other/disk"
        )
    if status:
        return DownloadFailed(f"{constants.ENDPOINT} answered {status} for {repo}", "try again in a while")
    reason = str(_root_cause(error)).strip().splitlines() or [type(error).__name__]
    return DownloadFailed(
        f"cannot fetch {repo} from {constants.ENDPOINT}: {reason[0]}",
        "check the network (or HF_ENDPOINT) and run the same command again: finished files are kept",
    )


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
