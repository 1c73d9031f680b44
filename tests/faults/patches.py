"""Faults in llama.cpp's source, one constant or one expression each.

A patch says where by the file, a mark (a name or a few words that occur there once, or the `nth` time), and the first
occurrence of `find` after it. It applies to the source package of the bindings that `constraints.txt` pins, and to
nothing else: a mark that is not found is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_REACH = 6000  # characters after the mark within which the change must lie

CPU = "ggml/src/ggml-cpu/"


@dataclass(frozen=True)
class Patch:
    """One change; `case` and `type` name the tiny model that feels it, `kind` and `where` what must be said of it."""

    name: str
    file: str
    mark: str
    find: str
    put: str
    case: str  # of tests/oracles
    kind: str
    where: str  # the first tap that differs, or the op that is wrong
    type: str = "F32"
    path: str | None = None  # of a kernel: `batch` or `single` where only one of them is wrong
    cure: str | None = None  # words that the finding must hold of the setting that cures it
    nth: int = 1  # which occurrence of the mark

    def apply(self, root: Path) -> str:
        """The file's text under `root` with the change; ValueError where it does not fit."""
        text = (root / self.file).read_text()
        at = -1
        for _ in range(self.nth):
            at = text.find(self.mark, at + 1)
            if at < 0:
                raise ValueError(f"{self.name}: {self.file} has no {self.mark!r} ({self.nth})")
        start = text.find(self.find, at, at + _REACH)
        if start < 0:
            raise ValueError(f"{self.name}: no {self.find!r} after {self.mark!r} in {self.file}")
        return text[:start] + self.put + text[start + len(self.find) :]


def _graph(name: str, file: str, mark: str, find: str, put: str, case: str, tap: str, **more: object) -> Patch:
    return Patch(name, "src/" + file, mark, find, put, case, "engine.graph", tap, **more)  # type: ignore[arg-type]


def _kernel(name: str, file: str, mark: str, find: str, put: str, case: str, op: str, **more: object) -> Patch:
    return Patch(name, CPU + file, mark, find, put, case, "engine.kernel", op, **more)  # type: ignore[arg-type]


PATCHES: tuple[Patch, ...] = (
    _graph("attention-scale", "models/llama.cpp", "float kq_scale", "1.0f/sqrtf", "1.1f/sqrtf", "llama", "attn_ctx"),
    _graph(
        "norm-eps",
        "llama-graph.cpp",
        "case LLM_NORM_RMS:",
        "hparams.f_norm",
        "1000*hparams.f_norm",
        "qwen3",
        "attn_norm",
    ),
    _graph("gate-up", "llama-graph.cpp", "ggml_swiglu_split(", "cur, tmp", "tmp, cur", "llama", "ffn_act"),
    _graph("activation", "models/gemma2.cpp", "LLM_FFN_GELU", "GELU", "SILU", "gemma2", "ffn_act"),
    _graph("mask-bound", "llama-kv-cache.cpp", "if (causal) {", "p0 > p1", "p0 > p1 + 1", "qwen2", "attn_ctx"),
    _graph("window", "llama-kv-cache.cpp", "!in_span && ", "(n_swa,", "(n_swa + 1,", "gemma3", "attn_ctx"),
    _graph(
        "rope-pairing",
        "llama-model.cpp",
        "case LLM_ARCH_QWEN3:",
        ":",
        ": return LLAMA_ROPE_TYPE_NORM;",
        "qwen3",
        "attn_q_rope",
        nth=2,
    ),
    _graph(
        "embedding-scale", "models/gemma3.cpp", "inpL = ggml_scale(", "sqrtf(n_embd)", "1.0f", "gemma3", "token_embd"
    ),
    _graph("softcap", "models/gemma4.cpp", "f_final_logit_softcapping) {", "1.0f /", "1.1f /", "gemma4", "logits"),
    _graph("experts-norm", "llama-graph.cpp", "if (norm_w) {", "norm_w", "false", "qwen3moe", "moe_experts"),
    _kernel(
        "rms-norm", "ops.cpp", "ggml_compute_forward_rms_norm_f32(", "sum/ne00", "sum/(ne00 - 1)", "llama", "RMS_NORM"
    ),
    _kernel(
        "softmax-scale",
        "ops.cpp",
        "ggml_compute_forward_soft_max_f32(",
        "wp, scale)",
        "wp, 1.01f*scale)",
        "llama",
        "SOFT_MAX",
    ),
    _kernel(
        "flash-scale",
        "ops.cpp",
        "ggml_compute_forward_flash_attn_ext_f16_one_chunk(",
        "if (logit_softcap != 0",
        "scale *= 1.01f; if (logit_softcap != 0",
        "llama",
        "FLASH_ATTN_EXT",
        cure="flash attention off",
    ),
    _kernel("rope-rotation", "ops.cpp", "static void rotate_pairs(", "- x1*sin", "- 1.01f*x1*sin", "qwen2", "ROPE"),
    _kernel("swiglu-sources", "ops.cpp", "ggml_vec_swiglu_f32(", "src0_p, src1_p", "src1_p, src0_p", "llama", "SWIGLU"),
    _kernel(
        "get-rows",
        "ops.cpp",
        "ggml_compute_forward_get_rows_q(",
        "i01*nb01",
        "(i01 ^ 1)*nb01",
        "llama",
        "GET_ROWS",
        type="Q8_0",
    ),
    _kernel(
        "vec-dot-q6_K",
        "arch/x86/quants.c",
        "void ggml_vec_dot_q6_K_q8_K(",
        "epi8(15)",
        "epi8(7)",
        "qwen2",
        "MUL_MAT",
        type="Q6_K",
    ),
    _kernel(
        "repack-q4_0",
        "arch/x86/repack.cpp",
        "void ggml_gemm_q4_0_8x8_q8_0(",
        "7, 6, 5,",
        "7, 5, 5,",
        "llama",
        "MUL_MAT",
        type="Q4_0",
        path="batch",
        cure="extra buffers off",
    ),
    _kernel(
        "repack-gemv-q4_K",
        "arch/x86/repack.cpp",
        "void ggml_gemv_q4_K_8x8_q8_K(",
        "0x3f3f3f3f",
        "0x1f1f1f1f",
        "llama",
        "MUL_MAT",
        type="Q4_K",
        path="single",
        cure="extra buffers off",
    ),
    _kernel(
        "expert-row",
        "ggml-cpu.c",
        "static void ggml_compute_forward_mul_mat_id_one_chunk(",
        "id % ne11",
        "0 % ne11",
        "qwen3moe",
        "MUL_MAT_ID",
    ),
    _kernel(
        "thread-rows",
        "binary-ops.cpp",
        "get_thread_range(",
        "ir < ir1",
        "ir < ir1 - (params->ith == 1)",
        "qwen2",
        "MUL",
        cure="one thread",
    ),
)
