"""What must hold for a rung to pass, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

__all__ = [
    "CONTINUATION",
    "CONTINUATION_WHY",
    "DECODE_KL",
    "DECODE_MEDIANS",
    "DECODE_WHY",
    "EXECUTION",
    "FLOAT16_TWIN",
    "INT8_ACTIVATIONS",
    "KV_CACHE_RATIO",
    "KV_CACHE_WHY",
    "LOCAL_TOLERANCE",
    "DENSE_PERPLEXITY_RATIO",
    "NEAR_TIE_NATS",
    "PERPLEXITY_RATIO",
    "RATIO_WHY",
    "ROUNDED_TIE_NATS",
    "SIZE_TOLERANCE",
    "SOFT_WHY",
    "SOURCE_RUNTIME",
    "ExecutionThreshold",
    "QualityLimit",
    "decode_limit",
    "float16_chains",
    "held_tolerance",
    "quality_limit",
]

PERPLEXITY_RATIO: dict[int, float | None] = {8: 1.03, 6: 1.05, 4: 1.7, 3: 1.7, 2: 2.5, 1: None}
"""Worst allowed perplexity of hard PyTorch as a multiple of the original's, by the fewest bits of a palettized weight;
None: there is none. docs/report.md has what was measured at each."""

DENSE_PERPLEXITY_RATIO = 1.01
"""The same where nothing is palettized: the weights are only rounded to float16."""

RATIO_WHY = (
    "a sound model of so few bits stays below it, and one whose clustering or training went wrong does not; both "
    "models ran on the same text"
)


@dataclass(frozen=True)
class QualityLimit:
    """What the quality is measured against.

    Attributes:
        ratio: worst allowed perplexity, as a multiple of the original's; None: it is only reported.
        source: who set it, in words.
    """

    ratio: float | None
    source: str


def quality_limit(bits: int | None, recipe: str = "") -> QualityLimit:
    """The limit that a preset sets.

    Args:
        bits: fewest bits of an index among the palettized weights; None: nothing is palettized.
        recipe: its name, for the words.
    """
    named = f", recipe {recipe}" if recipe else ""
    if bits is None:
        return QualityLimit(DENSE_PERPLEXITY_RATIO, f"the default where nothing is palettized{named}")
    many = f"{bits} bit{'s' if bits > 1 else ''}"
    return QualityLimit(PERPLEXITY_RATIO.get(bits), f"the default for {many}{named}")


KV_CACHE_RATIO = 1.05
"""Worst allowed perplexity of hard PyTorch with keys and values of int8, as a multiple of that with a float cache: the
room that 6 bits of a weight have."""

KV_CACHE_WHY = (
    "both have the same weights and read the same text, so that it is the loss of the cache alone; a model in which a "
    "few channels of the keys outweigh all others loses much, and should keep a float cache"
)

SOFT_WHY = (
    "nothing of it ships; it splits the distance between the original and hard PyTorch, which has a threshold, into "
    "what training left and what rounding to LUT entries adds"
)

NEAR_TIE_NATS = 0.01
"""Tokens whose probabilities differ by less than 1% are a near tie: which of them comes out first is no evidence.
RoPE tables and norms are float16 in a package, which moves logits by about 1e-3 even in float32 arithmetic."""

DECODE_KL = 1e-4
"""Largest KL divergence, in nats, of decoding token by token from one feed of the same text, at any position.
`decode_limit` is for coarser arithmetic."""

DECODE_WHY = (
    "both are the same sums in another order, which moves float32 logits by about 1e-5; a key or value in the wrong "
    "place, or a position off by one, shows at once"
)

CONTINUATION = (
    "the same tokens as hard PyTorch from each prompt, up to the first near tie that falls otherwise"
)

ROUNDED_TIE_NATS = 0.05
"""The same where every result is rounded to float16. That moves a log probability by about 0.005 (a median KL of 1.6e-5
on a model of 135 million parameters); a choice within ten times as much may fall otherwise."""

CONTINUATION_WHY = "it is what a user sees, and an error that feeds on itself shows only here"

LOCAL_TOLERANCE = {"float32": 2e-3, "rounded": 5e-2}
"""Largest relative error of an intermediate value before it is called wrong. RoPE tables in float16 cost about 2e-4 and
add up over the layers; rounding after each op costs ten times as much."""

SIZE_TOLERANCE = 0.01
"""Allowed relative difference between the weights on disk and the prediction."""


@dataclass(frozen=True)
class ExecutionThreshold:
    """How close an executed artifact must be to hard PyTorch.

    Attributes:
        words: the precision, in words.
        top1: least share of positions with the same most likely token, or with a near tie.
        median_kl: largest median KL divergence, in nats.
        why: the reason.
    """

    words: str
    top1: float
    median_kl: float
    why: str

    def because(self, why: str) -> ExecutionThreshold:
        """The same threshold for another reason."""
        return replace(self, why=why)

    def __str__(self) -> str:
        return (
            f"top-1 agreement at least {self.top1:.1%}, near ties aside; median KL at most {self.median_kl:g}"
        )


EXECUTION = {
    "float32": ExecutionThreshold(
        "float32",
        0.999,
        1e-5,
        "both sides compute in float32 with the same weights; a wrong weight, table or op shows at once",
    ),
    "rounded": ExecutionThreshold(
        "rounded to float16 after each op",
        0.99,
        1e-3,
        "rounding every result to float16 is the least that a phone does; an overflow or lost precision shows here",
    ),
}
"""By precision of the interpreter."""

INT8_ACTIVATIONS = ExecutionThreshold(
    "activations rounded to int8",
    0.9,
    2e-2,
    "the weights are exact, but MatMulNBits rounds activations to int8 in blocks; on SmolLM2-135M that alone costs a "
    "median of 0.007 nats and 6% of the top tokens. Whether the graph is right shows without that rounding",
)
"""For onnxruntime's 8-bit products, which the ONNX profile `fast` uses."""

FLOAT16_TWIN = ExecutionThreshold(
    "float16, matrix products in float32",
    0.99,
    1e-4,
    "every operation is Apple's and rounds to float16, except that weights are decoded once, which is compared bit for "
    "bit on a rung of its own, and that matrix products are computed in float32 and rounded once, as hardware does",
)
"""For Apple's Core AI runtime for Linux on the twin of a file; SmolLM2-135M at 4 bits: 2e-5."""


def float16_chains(lengths: Iterable[int]) -> ExecutionThreshold:
    """For Apple's Core AI runtime for Linux on a file itself, which adds products one after another in float16.

    Each addition rounds by up to 2**-11 of the partial sum, so that a sum of K random terms is off by a share of about
    2**-11 * sqrt(K / 3). The shares of all products of a token add up in squares, to e**2; logits that are spread with
    a standard deviation of s are then off by e * s, which costs e**2 * s**2 / 2 nats.

    Args:
        lengths: K of each product on the way from a token to its logits.
    """
    spread = 8.0  # of logits; 3 to 8 in the models that we measured
    squares = sum(2.0**-22 * length / 3 for length in lengths)
    return ExecutionThreshold(
        "float16, sums of products too",
        0.5,
        squares * spread**2 / 2,
        "the file as it is, at a few positions. This runtime adds the products of a matrix product one after another "
        "in float16, which no device does: a sum of K terms loses about 2**-11 * sqrt(K / 3) of itself, and the limit "
        "is what all of them together do to logits. The rung shows that the file runs and means the same; how exact "
        "the program is, the twin shows",
    )


SOURCE_RUNTIME = {
    False: EXECUTION["rounded"].because(
        "llama.cpp reads the file on its own, and unpacks quantized weights on its own; it then computes in float32 or "
        "float16"
    ),
    True: INT8_ACTIVATIONS.because(
        "llama.cpp reads the file on its own; with quantized weights it rounds activations to 8 bits in blocks: with "
        "SmolLM2-135M in Q4_1 that alone costs 3% of the top tokens, and none with the same weights in F32"
    ),
}
"""For the original against llama.cpp, by whether it rounds activations: where it cannot unpack quantized weights."""

DECODE_MEDIANS = 10
"""In coarse arithmetic the largest KL of decoding is compared with the median that its execution may have. KL
has a long tail: over the 32 positions that are decoded, the largest is a few times the median of a sound artifact."""


def held_tolerance(execution: ExecutionThreshold) -> float:
    """How far a key or value may be from the float of hard PyTorch before it becomes int8, as a share of the largest of
    its head and token: a scale may be off by as much, and a code by half a step and 127 times as much.

    That of intermediate values; in arithmetic that rounds activations to int8 a scale that is wrong by two still shows.
    """
    if execution.median_kl <= EXECUTION["float32"].median_kl:
        return LOCAL_TOLERANCE["float32"]
    return LOCAL_TOLERANCE["rounded"] if execution.median_kl <= EXECUTION["rounded"].median_kl else 0.4


def decode_limit(execution: ExecutionThreshold) -> float:
    """Largest KL of decoding against prefill, in the arithmetic of an execution, in nats."""
    if execution.median_kl <= EXECUTION["float32"].median_kl:
        return DECODE_KL
    return DECODE_MEDIANS * execution.median_kl
