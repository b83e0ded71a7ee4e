"""Which token begins, ends, pads a text, and whether the tokenizer adds it. Knows llama.cpp's keys for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgekit.vocab.built import Limit
from edgekit.vocab.files import Files
from edgekit.vocab.protobuf import SentencePiece
from edgekit.vocab.spaces import parts

KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # spelled so in llama.cpp (LLM_KV_TOKENIZER_SEP_ID)
    "pad": "padding_token_id",
    "cls": "cls_token_id",
    "mask": "mask_token_id",
    "fim_pre": "fim_pre_token_id",
    "fim_suf": "fim_suf_token_id",
    "fim_mid": "fim_mid_token_id",
    "fim_pad": "fim_pad_token_id",
    "fim_rep": "fim_rep_token_id",
    "fim_sep": "fim_sep_token_id",
}
_BY_TEXT = {
    "eot": (
        *("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]"),
        *("<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|endoftext|>"),
    ),
    "eom": ("<|eom_id|>",),
    "fim_pre": (
        *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>"),
        *("<|code_prefix|>", "<|prefix|>"),
    ),
    "fim_suf": (
        *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>"),
        *("<|code_suffix|>", "<|suffix|>"),
    ),
    "fim_mid": (
        *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>"),
        *("<|code_middle|>", "<|middle|>"),
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
"""llama.cpp finds these by their text when no key names them, in a hash table's order; named here, it is settled."""

ROLE_TEXTS = frozenset(t for texts in _BY_TEXT.values() for t in texts)
STOP_TEXTS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
        *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
    )
)
"""Texts that llama.cpp always takes for the end of generation (`special_eog_ids` in llama-vocab.cpp)."""


@dataclass(frozen=True)
class Frame:
    """What the post-processor puts around a text: token ids before and after, as the files have them.

    `pair_sep`: whether two texts have one token more between them than one has after it, which is what llama.cpp's
    add_sep_token means where pairs are read; None where the files say nothing of pairs.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    pair_sep: bool | None = None


@dataclass
class Specials:
    """`ids` by role (KEYS), the flags to write, ids that end generation, and what could not be expressed."""

    ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    stops: tuple[int, ...]
    warnings: list[str] = field(default_factory=list)


def frame_of(tokenizer: Mapping[str, Any], tokens: Sequence[str | None]) -> Frame:
    """From TemplateProcessing, BertProcessing, RobertaProcessing, or a Sequence of them."""
    before: list[int] = []
    after: list[int] = []
    sep: bool | None = None
    for part in parts(tokenizer.get("post_processor"), "processors"):
        if part.get("type") == "TemplateProcessing":
            first, last = _template(part, tokens)
            before, after = first + before, after + last
            between = _between(part)
            sep = sep if between is None else between == len(after) + 1
        elif part.get("type") in ("RobertaProcessing", "BertProcessing"):
            before.insert(0, int(part["cls"][1]))
            after.append(int(part["sep"][1]))
            sep = part["type"] == "RobertaProcessing"
    return Frame(tuple(before), tuple(after), sep)


def frame_of_config(files: Files, model: SentencePiece | None) -> Frame:
    """Without tokenizer.json: what tokenizer_config.json says; a BOS and no EOS where it says nothing."""
    bos = files.config.get("add_bos_token", True) is True
    eos = files.config.get("add_eos_token", False) is True
    if model is None:
        return Frame()
    return Frame(
        (model.bos_id,) if bos and model.bos_id >= 0 else (), (model.eos_id,) if eos and model.eos_id >= 0 else ()
    )


def _template(part: Mapping[str, Any], tokens: Sequence[str | None]) -> tuple[list[int], list[int]]:
    before: list[int] = []
    after: list[int] = []
    side = before
    named = part.get("special_tokens") or {}
    for item in part.get("single") or ():
        if "Sequence" in item:
            side = after
            continue
        text = item.get("SpecialToken", {}).get("id")
        ids = (named.get(text) or {}).get("ids") or ([tokens.index(text)] if text in tokens else [])
        side += [int(i) for i in ids]
    return before, after


def _between(part: Mapping[str, Any]) -> int | None:
    """How many special tokens are between two texts; None where a template has no two."""
    kinds = ["Sequence" if "Sequence" in item else "SpecialToken" for item in part.get("pair") or ()]
    if kinds.count("Sequence") != 2:
        return None
    start = kinds.index("Sequence")
    return kinds.index("Sequence", start + 1) - start - 1


def frame_limits(frame: Frame, tokens: Sequence[str | None]) -> list[Limit]:
    """More than one token on a side is more than llama.cpp adds."""
    if len(frame.before) <= 1 and len(frame.after) <= 1:
        return []
    before, after = [tokens[i] for i in frame.before], [tokens[i] for i in frame.after]
    return [
        Limit(
            f"the tokenizer puts {before} before and {after} after a text; llama.cpp adds at most one on each side: "
            "write them into the prompt, as the chat template does",
            lambda text: True,
            "framed",
        )
    ]


def find(files: Files, tokens: Sequence[str | None], frame: Frame, roles: Mapping[str, int]) -> Specials:
    """Ids by role. `roles` are those that the vocabulary itself names (a SentencePiece model, a model's unk_token)."""
    ids = _by_name(files, tokens, roles)
    index = {t: i for i, t in enumerate(tokens) if t}
    warnings: list[str] = []
    one_before, one_after = len(frame.before) == 1, len(frame.after) == 1
    if one_before:
        ids["bos"] = frame.before[0]
    if one_after:
        ids["eos"] = frame.after[0]
    stops = _stops(files, ids, len(tokens))
    for role, texts in _BY_TEXT.items():
        found = next((index[t] for t in texts if t in index), None)
        if found is not None:
            ids.setdefault(role, found)
    warnings += _place_stops(ids, stops, tokens)
    if "eos" not in ids and "eot" in ids:
        ids["eos"] = ids["eot"]
    if "bos" not in ids and "eos" in ids:
        ids["bos"] = ids["eos"]  # else llama.cpp takes token 11 of a BPE vocabulary, whatever that is
    return Specials(ids, one_before, one_after, tuple(stops), warnings)


def _by_name(files: Files, tokens: Sequence[str | None], roles: Mapping[str, int]) -> dict[str, int]:
    ids: dict[str, int] = {}
    for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        text = files.special_text(role)
        named = [tokens.index(text)] if text in tokens else []
        for candidate in (*named, *([roles[role]] if role in roles else ()), *files.config_ids(role)):
            if candidate < len(tokens):
                ids.setdefault(role, candidate)
    return ids


def _stops(files: Files, ids: Mapping[str, int], size: int) -> list[int]:
    """Every id that ends generation: the tokenizer's eos first, then what the configurations list."""
    stops = [ids["eos"]] if "eos" in ids else []
    for number in files.config_ids("eos"):
        begins = number == ids.get("bos") and ids.get("eos") != number  # a stale config.json, seen in the wild
        if number < size and number not in stops and not begins:
            stops.append(number)
    return stops


def _place_stops(ids: dict[str, int], stops: Sequence[int], tokens: Sequence[str | None]) -> list[str]:
    """Puts stop ids that llama.cpp does not know by their text into the free end-of-turn and end-of-message roles."""
    loose = [i for i in stops if tokens[i] not in STOP_TEXTS and i != ids.get("eos")]
    for role in ("eot", "eom"):
        held = ids.get(role)
        free = held is None or tokens[held] in STOP_TEXTS
        if loose and free:
            ids[role] = loose.pop(0)
    return [f"generation should also end at token {i} ({tokens[i]!r}); llama.cpp has no place for it" for i in loose]
