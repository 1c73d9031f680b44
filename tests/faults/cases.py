"""Every planted engine fault, and the clean cells that must not be called one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.faults.patches import PATCHES, Patch


@dataclass(frozen=True)
class Fault:
    """An engine that is wrong in one way, and what must be said of it."""

    name: str
    case: str  # of tests/oracles
    kind: str
    where: str  # tap below `blk.N.`, or op
    type: str = "F32"
    override: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    patch: Patch | None = None


def _override(case: str, key: str, value: str, tap: str) -> Fault:
    arch = {"llama-llama3": "llama", "llama-linear": "llama", "llama-yarn": "llama", "mixtral": "llama"}.get(
        case, case.split("-")[0]
    )
    return Fault(f"{case}-{key}={value}", case, "engine.graph", tap, override=f"{arch}.{key}={value}")


_ROPE, _EPS, _WINDOW = "rope.freq_base", "attention.layer_norm_rms_epsilon", "attention.sliding_window"

OVERRIDES = tuple(
    _override(*row)
    for row in (
        ("llama", _ROPE, "float:9000", "attn_q_rope"),
        ("llama", _EPS, "float:0.01", "attn_norm"),
        ("mixtral", _EPS, "float:0.02", "attn_norm"),
        ("qwen3moe", _EPS, "float:0.0005", "attn_norm"),
        ("llama-llama3", _ROPE, "float:11000", "attn_q_rope"),
        ("llama-linear", "rope.scaling.factor", "float:1", "attn_q_rope"),
        ("llama-linear", "rope.scaling.factor", "float:9", "attn_q_rope"),
        ("llama-linear", _EPS, "float:0.0005", "attn_norm"),
        ("llama-yarn", "rope.scaling.factor", "float:2", "attn_q_rope"),
        ("llama-yarn", "rope.scaling.original_context_length", "int:8", "attn_q_rope"),
        ("llama-yarn", "rope.scaling.type", "str:linear", "attn_q_rope"),
        ("mixtral", "expert_used_count", "int:1", "moe_experts"),
        ("mixtral", _ROPE, "float:20000", "attn_q_rope"),
        ("qwen2", _ROPE, "float:500000", "attn_q_rope"),
        ("qwen2", _EPS, "float:0.0011", "attn_norm"),
        ("qwen2-yarn", "rope.scaling.factor", "float:8", "attn_q_rope"),
        ("qwen3", _EPS, "float:0.002", "attn_norm"),
        ("qwen3", _ROPE, "float:10001", "attn_q_rope"),
        ("qwen3-yarn", "rope.scaling.type", "str:none", "attn_q_rope"),
        ("qwen3moe", "expert_used_count", "int:2", "moe_experts"),
        ("qwen3moe", _ROPE, "float:5000", "attn_q_rope"),
        ("gemma2", "attn_logit_softcapping", "float:30", "attn_ctx"),
        ("gemma2", "final_logit_softcapping", "float:8", "logits"),
        ("gemma2", _WINDOW, "int:8", "attn_ctx"),
        ("gemma2", _EPS, "float:0.01", "attn_norm"),
        ("gemma3", _WINDOW, "int:12", "attn_ctx"),
        ("gemma3", _WINDOW, "int:15", "attn_ctx"),
        ("gemma3", _ROPE, "float:10000", "attn_q_rope"),
        ("gemma3", "rope.scaling.factor", "float:1", "attn_q_rope"),
        ("gemma4", "final_logit_softcapping", "float:30", "logits"),
        ("gemma4", _WINDOW, "int:4", "attn_ctx"),
        ("gemma4", _WINDOW, "int:17", "attn_ctx"),
        ("gemma4", "rope.freq_base_swa", "float:20000", "attn_q_rope"),
        ("gemma4", _ROPE, "float:10000", "attn_q_rope"),
        ("gemma4-experts", "expert_used_count", "int:1", "moe_experts"),
    )
)

CONTEXT = tuple(
    Fault(f"{case}-context-{'-'.join(changes)}", case, "engine.graph", "attn_q_rope", settings=changes)
    for case, changes in (
        ("llama", {"rope_freq_base": 9500.0}),
        ("qwen2", {"rope_freq_scale": 0.5}),
        ("mixtral", {"rope_freq_scale": 0.99}),
        ("qwen3", {"rope_freq_scale": 0.25, "yarn_ext_factor": 1.0}),
        ("llama-yarn", {"yarn_beta_slow": 0.1}),
        ("llama-linear", {"rope_freq_scale": 0.2}),
        ("llama-yarn", {"yarn_ext_factor": 0.0}),
        ("qwen2-yarn", {"yarn_orig_ctx": 8}),
        ("gemma4", {"rope_freq_base": 500000.0}),
    )
)

SOURCE = tuple(Fault(p.name, p.case, p.kind, p.where, type=p.type, patch=p) for p in PATCHES)

FAULTS = OVERRIDES + CONTEXT + SOURCE


@dataclass(frozen=True)
class Clean:
    """A sound engine on a sound file under some settings."""

    case: str
    type: str = "F32"
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "-".join([self.case, self.type, *(f"{key}={value}" for key, value in self.settings.items())])


_CASES = ("llama", "mixtral", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "gemma4", "gemma4-experts")
_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_XS")
_SETTINGS: tuple[dict[str, Any], ...] = (
    {"flash_attn": "off"},
    {"extra_bufts": False},
    {"n_ubatch": 7},
    {"type_k": "F32", "type_v": "F32"},
    {"type_k": "Q8_0"},
    {"threads": 2},
)

CLEAN = (
    *(Clean(case, _TYPES[(i + j) % len(_TYPES)]) for i, case in enumerate(_CASES) for j in (0, 3, 5, 6)),
    *(Clean(case, "Q4_K", changes) for case, changes in zip(_CASES, _SETTINGS * 2, strict=False)),
    Clean("llama", "Q4_0", {"n_batch": 32, "n_ubatch": 16}),
    Clean("qwen3moe", "Q8_0", {"flash_attn": "off", "extra_bufts": False}),
)
