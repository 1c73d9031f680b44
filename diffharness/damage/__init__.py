"""Seeded faults on a copy of a GGUF: for tests, demos, and whoever doubts what the other commands say."""

from diffharness.damage.applying import KEY, Change, Damage, apply
from diffharness.damage.draft import Draft, Edit, Fault, Options, Quantize, Target
from diffharness.damage.faults import FAULTS

__all__ = [
    "FAULTS",
    "KEY",
    "Change",
    "Damage",
    "Draft",
    "Edit",
    "Fault",
    "Options",
    "Quantize",
    "Target",
    "apply",
]
