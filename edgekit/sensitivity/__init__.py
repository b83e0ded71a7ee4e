"""What each format costs each part of a model: KL divergence, measured in the running model one group at a time.

Knows groups, probes and how to reckon between them; writes no file and decides nothing (edgekit.mixing does).
"""

from edgekit.sensitivity._costs import Combined, Probe, Sensitivity, from_json
from edgekit.sensitivity._groups import (
    COMBINED,
    CONSIDERED,
    NARROW_PROBES,
    PASS,
    PROBES,
    Array,
    Assignment,
    Bytes,
    Encode,
    Group,
    Importance,
    Part,
    choose_probes,
    combinations,
    group,
    parts_of,
    passes,
)  # fmt: skip
from edgekit.sensitivity._measure import SAMPLE, measure, rounding_errors

__all__ = [
    "COMBINED", "CONSIDERED", "NARROW_PROBES", "PASS", "PROBES", "SAMPLE", "Array", "Assignment", "Bytes", "Combined",
    "Encode", "Group", "Importance", "Part", "Probe", "Sensitivity", "choose_probes", "combinations", "from_json",
    "group", "measure", "parts_of", "passes", "rounding_errors",
]  # fmt: skip
