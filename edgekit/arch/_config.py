"""config.json read with suspicion: every value is checked for kind and range, and no setting that changes the
arithmetic goes unread. Knows no family."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from edgekit.errors import CorruptCheckpoint, UnsupportedModel

MAX_SIZE = 1 << 31
"""Upper bound of any size in a config: GGUF stores them as 32-bit numbers."""

_LARGEST = 3.4028234663852886e38  # of float32, which GGUF stores

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_k_eq_v": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (0, 0.0),
    "clip_qkv": (),
    "embedding_multiplier": (1, 1.0),
    "final_logit_softcapping": (0, 0.0),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "mlp_bias": (False,),
    "n_routed_experts": (0,),
    "no_rope_layer_interval": (0,),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_local_experts": (0, 1),
    "parallel_attn": (False,),
    "parallel_residual": (False,),
    "partial_rotary_factor": (1, 1.0),
    "position_embedding_type": ("absolute",),
    "qk_layernorm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1, 1.0),
    "rotary_pct": (1, 1.0),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "sliding_window": (0,),
    "use_bias": (False,),
    "use_bidirectional_attention": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
    "use_qkv_bias": (False,),
    "use_sliding_window": (False,),
}
"""Settings that change what a model computes, with the values (beside null) under which they change nothing.
A family that knows one of them reads it; for all others it has to be neutral."""


class Settings:
    """The part of a config.json that describes the text model. `defaults` are those of the transformers class."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._values = {**defaults, **config}
        self._defaults = defaults
        self._read: set[str] = set()

    def raw(self, key: str) -> Any:
        """The value as it stands, None if absent or null."""
        self._read.add(key)
        return self._values.get(key)

    def _find(self, keys: tuple[str, ...]) -> tuple[str, Any]:
        for key in keys:
            if (value := self.raw(key)) is not None:
                return key, value
        for key in keys:
            if (value := self._defaults.get(key)) is not None:
                return key, value
        return keys[0], None

    def integer(self, *keys: str, default: int | None = None, low: int = 1, high: int = MAX_SIZE - 1) -> int:
        """The first of `keys` that is there; a default makes it optional. Raises CorruptCheckpoint."""
        key, value = self._find(keys)
        if value is None:
            value = default
        if value is None:
            raise CorruptCheckpoint(f"config.json: {key} is missing", "take the model's original config.json")
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise CorruptCheckpoint(f"config.json: {key} is {value!r}, expected a whole number from {low} to {high}")
        return value

    def optional(self, key: str, low: int = 1) -> int | None:
        """A whole number, or None where the key is null or absent; zero counts as absent."""
        value = self.raw(key)
        return None if value is None or value == 0 else self.integer(key, low=low)

    def number(self, *keys: str, default: float | None = None) -> float:
        """A finite number. Raises CorruptCheckpoint."""
        key, value = self._find(keys)
        return checked_number(f"config.json: {key}", default if value is None else value)

    def positive(self, *keys: str, default: float | None = None) -> float:
        """A finite number above zero. Raises CorruptCheckpoint."""
        value = self.number(*keys, default=default)
        if value <= 0:
            raise CorruptCheckpoint(f"config.json: {keys[0]} is {value!r}, expected a number above zero")
        return value

    def flag(self, key: str) -> bool:
        """A boolean; absent and null are the default, false without one. Raises CorruptCheckpoint."""
        value = self._find((key,))[1]
        if value is None:
            return False
        if not isinstance(value, bool):
            raise CorruptCheckpoint(f"config.json: {key} is {value!r}, expected true or false")
        return value

    def numbers(self, key: str) -> list[Any] | None:
        """A list, or None. Raises CorruptCheckpoint."""
        value = self.raw(key)
        if value is not None and not isinstance(value, list):
            raise CorruptCheckpoint(f"config.json: {key} is {value!r}, expected a list")
        return value

    def table(self, key: str) -> Mapping[str, Any] | None:
        """An object, or None. Raises CorruptCheckpoint."""
        value = self.raw(key)
        if value is not None and not isinstance(value, Mapping):
            raise CorruptCheckpoint(f"config.json: {key} is {value!r}, expected an object")
        return value

    def needs(self, key: str, allowed: Iterable[Any], why: str) -> None:
        """Refuse unless the value is among `allowed`; absent and null take the default. Raises UnsupportedModel."""
        value = self._find((key,))[1]
        allowed = list(allowed)
        if not any(_same(value, a) for a in allowed):
            self.refuse(key, why + "; it can be " + ", ".join(repr(a) for a in allowed))

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raises UnsupportedModel, naming the key and its value."""
        raise UnsupportedModel(f"config.json: {key} is {self._find((key,))[1]!r}: {why}")

    def check_rest(self) -> None:
        """Refuse every setting of NEUTRAL that nobody has read and that is not neutral. Raises UnsupportedModel."""
        for key, allowed in NEUTRAL.items():
            value = self._values.get(key)
            if key in self._read or value is None or any(_same(value, a) for a in allowed):
                continue
            if key == "sliding_window" and self._values.get("use_sliding_window") is False:
                continue
            self.refuse(key, "llama.cpp's graph for this family does not compute that")
        if "layer_types" not in self._read and any(k != "full_attention" for k in self.numbers("layer_types") or ()):
            self.refuse("layer_types", "llama.cpp's graph for this family has full attention in every layer")


def checked_number(what: str, value: Any) -> float:
    """`value` as a finite float. Raises CorruptCheckpoint, calling it `what`."""
    if value is None:
        raise CorruptCheckpoint(f"{what} is missing", "take the model's original config.json")
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise CorruptCheckpoint(f"{what} is {value!r}, expected a finite number")
    return float(value)


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)
