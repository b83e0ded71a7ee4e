"""From the shape of a tokenizer.json pre-tokenizer to the name of the llama.cpp one that splits words the same way.

Knows regexes and names; knows no vocabulary. Facts: `llm_tokenizer_bpe` and `llama_vocab::impl::load` in llama.cpp's
src/llama-vocab.cpp (b-series vendored by llama-cpp-python 0.3.36) for the names, their regexes and their flags.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from edgekit.corpus import STRINGS
from edgekit.errors import CorruptCheckpoint

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCT = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_CJK3 = "[一-龥\u3040-ゟ゠-ヿ]+"
_ASCII_PUNCT = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""


def _as_run(letters: str, contractions: str, digits: str) -> str:
    """The same rule as llama.cpp writes it: without classes for case, only A-Z and a-z tell it."""
    upper, lower = rf"((?=[{letters}])([^a-z]))", rf"((?=[{letters}])([^A-Z]))"
    words = f"{_LEAD}{upper}*{lower}+{contractions}|{_LEAD}{upper}+{lower}*{contractions}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_TAIL}"


def _cased(contractions: str, digits: str) -> str:
    """The two-case word rule of o200k and Tekken."""
    words = f"{_LEAD}{_UPPER}*{_LOWER}+{contractions}|{_LEAD}{_UPPER}+{_LOWER}*{contractions}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_TAIL}"


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}{_PUNCT}{_TAIL}"
QWEN2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{_PUNCT}{_TAIL}"
QWEN35 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_TAIL}"
_O200K_REST = (_CONTRACTIONS + "?", r"\p{N}{1,3}")
O200K = _cased(*_O200K_REST)
TEKKEN = _cased("", r"\p{N}")
DEEPSEEK3 = rf"{_ASCII_PUNCT}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*{_TAIL}"
_BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True, slots=True)
class Pre:
    """A pre-tokenizer of the runtime: regexes applied one after the other, every match and every gap a piece."""

    name: str
    steps: tuple[str, ...]
    ignore_merges: bool = False
    runs: tuple[str, ...] = ()
    """The regexes that the runtime has in place of `steps`, where they are not the same."""


TABLE: tuple[Pre, ...] = (
    Pre("gpt-2", (GPT2,)),
    Pre("llama-bpe", (LLAMA3,), ignore_merges=True),
    Pre("smaug-bpe", (LLAMA3,)),
    Pre("glm4", (LLAMA3,), ignore_merges=True),
    Pre("qwen2", (QWEN2,)),
    Pre("qwen35", (QWEN35,)),
    Pre("smollm", (r"\p{N}", GPT2)),
    Pre("falcon", (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    Pre("deepseek-v3", (r"\p{N}{1,3}", _CJK3, DEEPSEEK3)),
    Pre("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")),
    Pre("tekken", (TEKKEN,), ignore_merges=True, runs=(_as_run(r"\p{L}", "", r"\p{N}"),)),
    Pre("granite-embed-multi-97m", (O200K,), ignore_merges=True, runs=(_as_run(r"\p{L}\p{M}", *_O200K_REST),)),
    Pre("gpt-4o", (O200K,), runs=(_as_run(r"\p{L}", *_O200K_REST),)),
    Pre("seed-coder", (rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{_TAIL}",)),
    Pre("ufakzeka", (rf"{_LETTERS}|\p{{N}}{_PUNCT}{_TAIL}",)),
    Pre("bailingmoe", (rf"'(?i:[sdmt]|ll|ve|re)|{_LETTERS}|\p{{N}}{_PUNCT}|\s*[\r\n]|\s+(?!\S)|\s+",)),
    Pre("minicpm5", (r"\p{N}{1,3}", rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}+{_PUNCT}{_TAIL}"), ignore_merges=True),
    Pre("laguna", (r"[^\n]+|[\n]+", QWEN2)),
    Pre("poro-chat", (_BLOOM,)),
    Pre("viking", (_BLOOM, r"\p{N}")),
    Pre("default", (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
)
"""One row for every way of splitting. Rows of the same `steps` differ in `ignore_merges`; the first one is preferred.
Other names of llama.cpp are aliases of these (`dbrx` of `smaug-bpe`, `starcoder` and `refact` of `smollm`, ...)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A byte-level pre-tokenizer taken apart. `steps` is None where some part is no isolating regex split."""

    steps: tuple[str, ...] | None
    add_prefix_space: bool
    why: str = ""


def shape_of(pre_tokenizer: object) -> Shape:
    """Reads the `pre_tokenizer` object of a byte-level BPE. Raises CorruptCheckpoint for one that makes no sense."""
    steps: list[str] = []
    prefix, why = False, ""
    for part in _parts(pre_tokenizer):
        kind = part.get("type")
        if kind == "ByteLevel":
            prefix = prefix or part.get("add_prefix_space", True) is True
            if part.get("use_regex", True):
                steps.append(GPT2)
            continue
        step = _step(part)
        if step is None:
            why = f"{kind} { ({k: v for k, v in part.items() if k != 'type'}) }"
        else:
            steps.append(step)
    return Shape(None if why else tuple(canonical(s) for s in steps), prefix, why)


def exact(shape: Shape, ignore_merges: bool) -> list[Pre]:
    """Rows with the same steps; those that treat merges alike come first."""
    if shape.steps is None:
        return []
    rows = [row for row in TABLE if tuple(map(canonical, row.steps)) == _reduced(shape.steps)]
    return sorted(rows, key=lambda row: row.ignore_merges != ignore_merges)


def canonical(regex: str) -> str:
    """One spelling for regexes that mean the same: escapes, possessive marks, `{1}`, literal line ends."""
    text = regex.replace("\r", r"\r").replace("\n", r"\n").replace("\t", r"\t")
    text = re.sub(r"\(\?i:([^()]*)\)", lambda m: f"(?:{_fold(m[1])})", text)
    text = re.sub(r"(?<!\\)([?*+}])\+", r"\1", text)
    text = text.replace(r"\p{N}{1}", r"\p{N}").replace(r"\p{Nd}", r"\d").replace("{0,1}", "?")
    return re.sub(r"^\((?!\?)([^()]*)\)$", r"\1", text)


def _fold(alternatives: str) -> str:
    """`'s|'ll` -> `'[sS]|'[lL][lL]`; a class `[sd]` -> `[sSdD]`."""
    out, inside = [], False
    for c in alternatives:
        inside = c == "[" or (inside and c != "]")
        both = f"{c}{c.upper()}" if c.isalpha() and c.isascii() else c
        out.append(both if inside or len(both) == 1 else f"[{both}]")
    return "".join(out)


def _reduced(steps: Sequence[str]) -> tuple[str, ...]:
    """Steps without those that can split nothing after the ones before them."""
    kept: list[str] = []
    for step in steps:
        if not (kept and kept[-1] == step):
            kept.append(step)
    return tuple(kept)


def _parts(pre_tokenizer: object) -> Iterator[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return
    if not isinstance(pre_tokenizer, dict):
        raise CorruptCheckpoint(f"tokenizer.json: pre_tokenizer is {type(pre_tokenizer).__name__}, not an object")
    nested = pre_tokenizer.get("pretokenizers")
    if pre_tokenizer.get("type") == "Sequence" and isinstance(nested, list):
        for part in nested:
            yield from _parts(part)
    else:
        yield pre_tokenizer


def _step(part: Mapping[str, Any]) -> str | None:
    """The isolating regex that a part stands for; None if it is not one."""
    kind, behavior = part.get("type"), str(part.get("behavior", "")).lower()
    if kind == "Digits":
        return r"\p{N}" if part.get("individual_digits") else r"\p{N}+"
    if kind == "Punctuation" and behavior == "contiguous":
        return r"[\p{P}\$\+<=>\^~\|`]+"
    if kind != "Split" or not isinstance(part.get("pattern"), dict):
        return None
    regex = part["pattern"].get("Regex")
    if not isinstance(regex, str):
        return None
    keeps_all = regex.endswith(r"|\s+")
    isolates = behavior == "isolated" or (behavior == "removed" and part.get("invert") is True and keeps_all)
    return regex if isolates else None


def nearest(pre_tokenizer: object, ignore_merges: bool, keep: int = 3) -> list[Pre]:
    """The rows that cut the probe corpus most like `pre_tokenizer`, as the `tokenizers` library runs both."""
    own = [pieces(pre_tokenizer, text) for text in STRINGS]
    scored = []
    for order, row in enumerate(TABLE):
        runs = as_json(row)
        differ = sum(a != pieces(runs, text) for a, text in zip(own, STRINGS, strict=True))
        scored.append((differ, row.ignore_merges != ignore_merges, order))
    return [TABLE[order] for _, _, order in sorted(scored)[:keep]]


def as_json(row: Pre) -> dict[str, Any]:
    """The pre_tokenizer object that splits as the runtime does under this name."""
    steps = [
        {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
        for step in row.runs or row.steps
    ]
    return {"type": "Sequence", "pretokenizers": [*steps, _BYTES]}


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def pieces(pre_tokenizer: object, text: str) -> list[str]:
    """The pieces that a pre_tokenizer object of a tokenizer.json cuts `text` into."""
    splitter = _splitter(json.dumps(pre_tokenizer))
    return [piece for piece, _ in splitter.pre_tokenize_str(text)] if splitter else [text]


@lru_cache(maxsize=64)
def _splitter(pre_tokenizer: str) -> Any:
    from tokenizers import Tokenizer, models

    shell = json.loads(Tokenizer(models.BPE()).to_str())
    shell["pre_tokenizer"] = json.loads(pre_tokenizer)
    return Tokenizer.from_str(json.dumps(shell)).pre_tokenizer
