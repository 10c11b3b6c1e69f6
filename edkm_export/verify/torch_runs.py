"""Running the models of transformers that the artifact is compared with: the original, soft and hard PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edkm_export.artifact.execution import Execute
from edkm_export.artifact.generation import generate
from edkm_export.artifact.metrics import Divergence, Perplexity, divergence, perplexity, snr_db, token_losses
from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import EdkmExportError, InputError
from edkm_export.kv_cache import FLOAT, INT8, KVCache
from edkm_export.palette import PalettizedTensor
from edkm_export.reference.caching import new_cache, run_cached
from edkm_export.reference.conv1d import as_linear, conv1d_weights, is_conv1d
from edkm_export.reference.soft_model import load_soft_model
from edkm_export.reference.source import load_model
from edkm_export.reference.streamed_model import is_layer, run_all, streamed_weights
from edkm_export.reference.torch_session import TorchSession
from edkm_export.verify.inputs import VerificationInputs
from edkm_export.verify.report import LayerError
from edkm_export.verify.time_budget import Budget, Share, run_windows

__all__ = [
    "Measured",
    "hidden_states",
    "comparing_outputs",
    "distance_of",
    "how_run",
    "layer_errors",
    "measure_original",
    "measure_soft",
    "perplexity_of",
    "transformers_model",
]


@dataclass
class Measured:
    """What a model of transformers gave.

    Attributes:
        logits: float32 [positions, vocab_size] of each window.
        hidden: states after each layer by module name, float32 [positions, hidden], of the first window.
        weights: the palettized parameters in float, by name; they may be read when they are asked for.
        output_snr_db: what palettization does to each layer's output, by parameter name.
        continued: tokens of the greedy continuation by prompt.
        how: whether the weights were in memory, in words.
        further: what else was asked of it.
    """

    logits: list[Tensor]
    hidden: dict[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    output_snr_db: dict[str, float] = field(default_factory=dict)
    continued: dict[str, list[int]] = field(default_factory=dict)
    how: str = "whole"
    further: Any = None


def transformers_model(model: Any, kv_cache: KVCache = FLOAT) -> Execute:
    """Run a model of transformers; one whose weights are read while it runs takes several texts together.

    Args:
        model: transformers.PreTrainedModel.
        kv_cache: how attention reads keys and values, the newest too.
    """
    return (_Whole if streamed_weights(model) is None else _Streamed)(model, kv_cache)


@dataclass(frozen=True)
class _Whole:
    model: Any
    kv_cache: KVCache = FLOAT

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        if self.kv_cache == INT8:
            return run_cached(self.model, tokens[None], new_cache(self.model, self.kv_cache))[0].float()
        logits: Tensor = self.model(input_ids=tokens[None], use_cache=False).logits[0]
        return logits.float()


@dataclass(frozen=True)
class _Streamed(_Whole):
    def together(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """Logits float32 [positions, vocab_size] of each."""
        return run_all(self.model, [partial(self, tokens) for tokens in texts])


def how_run(model: Any) -> str:
    """Whether the weights are in memory, in words."""
    weights = streamed_weights(model)
    return "whole" if weights is None else weights.words


def measure_original(
    checkpoint: Checkpoint,
    evaluation: VerificationInputs,
    windows: Tensor,
    prompts: Mapping[str, Tensor],
    budget: Budget,
    room_bytes: int | None = None,
    further: Callable[[Any], Any] = lambda _model: None,
) -> tuple[Measured | None, str]:
    """Run the float model.

    Args:
        checkpoint: names the weights to compare.
        evaluation: the original, and how far prompts are continued.
        windows: int64 [windows, positions].
        prompts: int64 [length] by prompt.
        budget: of the time.
        room_bytes: see `load_model`.
        further: called with the model at the end, for what else is asked of it.

    Returns:
        What it gave; None and the reason when there is no such model.

    Raises:
        EdkmExportError: the user named it, and it cannot be used.
    """
    if evaluation.original is None:
        return None, evaluation.original_missing
    try:
        model = load_model(evaluation.original, torch.float32, room_bytes=room_bytes)
        state = as_linear(model, model.state_dict())
        for name, tensor in checkpoint.palettized.items():
            if name not in state or tuple(state[name].shape) != tensor.shape:
                raise InputError(
                    f"{evaluation.original.reference}: {name} is missing or has another shape than in "
                    f"{checkpoint.path}; it is another model."
                )
    except EdkmExportError as error:
        if evaluation.original_required:
            raise
        return None, str(error)
    execute, share = transformers_model(model), budget.share()
    with comparing_outputs(model, checkpoint) as snr, hidden_states(model) as hidden:
        first = execute(windows[0])
    continued = _continue(model, prompts, evaluation.continuation, share)
    logits = [first, *run_windows(execute, windows[1:], share)]
    weights: Mapping[str, Tensor] = {name: state[name] for name in checkpoint.palettized}
    if streamed_weights(model) is not None:
        weights = _WeightsOnDisk(model, checkpoint.palettized)
    return Measured(logits, hidden, weights, snr, continued, how_run(model), further(model)), ""


class _WeightsOnDisk(Mapping[str, Tensor]):
    """Weights of a streamed model, [out, in], read when they are asked for."""

    def __init__(self, model: Any, names: Iterable[str]) -> None:
        weights = streamed_weights(model)
        assert weights is not None
        weights.release()
        self._weights, self._names, self._turned = weights, list(names), conv1d_weights(model)

    def __getitem__(self, name: str) -> Tensor:
        value = self._weights.read(name)
        return value.t().contiguous() if name in self._turned else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _continue(model: Any, prompts: Mapping[str, Tensor], count: int, share: Share) -> dict[str, list[int]]:
    """Greedy continuations of as many prompts as there is time for."""
    found: dict[str, list[int]] = {}

    def go_on(prompt: str, ids: Tensor) -> None:
        session = TorchSession(model, "the original")
        wanted = min(count, session.context - len(ids))
        # a model whose logits are not finite has no continuation; its perplexity tells
        with contextlib.suppress(InputError):
            found[prompt] = generate(session, ids, max_new_tokens=wanted).tokens

    if streamed_weights(model) is not None:  # all of them cost what one does
        run_all(model, [partial(go_on, prompt, ids) for prompt, ids in prompts.items()])
        return found
    for prompt, ids in share.within(prompts.items()):
        go_on(prompt, ids)
    return found


def measure_soft(
    checkpoint: Checkpoint,
    evaluation: VerificationInputs,
    windows: Tensor,
    budget: Budget,
    room_bytes: int | None = None,
) -> tuple[list[Tensor] | None, str]:
    """Run the trained soft model, which is done whole or not at all.

    Returns:
        Logits float32 [positions, vocab_size] of each window; None and the reason when there is no such model.

    Raises:
        EdkmExportError: the user named the run, and it cannot be used.
    """
    if evaluation.soft is None:
        return None, evaluation.soft_missing
    if room_bytes is not None:
        return None, (
            f"the soft model is only run whole, which takes {4 * checkpoint.numel / 1e9:.1f} GB; "
            "give it more memory (--memory)"
        )
    try:
        execute = transformers_model(load_soft_model(checkpoint, evaluation.soft))
    except EdkmExportError as error:
        if evaluation.soft_required:
            raise
        return None, str(error)
    return run_windows(execute, windows, budget.share()), ""


def layer_errors(reference: dict[str, Tensor], candidate: dict[str, Tensor]) -> list[LayerError]:
    """Compare hidden states layer by layer."""
    return [
        LayerError(layer=name, snr_db=snr_db(states, candidate[name]))
        for name, states in reference.items()
        if name in candidate
    ]


@contextlib.contextmanager
def hidden_states(model: Any) -> Iterator[dict[str, Tensor]]:
    """Record what each decoder layer gives while the model runs, by module name."""
    found: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if is_layer(name):
            handles.append(module.register_forward_hook(_recorder(found, name)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _recorder(found: dict[str, Tensor], name: str) -> Any:
    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        found[name] = states.detach()[0].float().clone()

    return record


@contextlib.contextmanager
def comparing_outputs(model: Any, checkpoint: Checkpoint) -> Iterator[dict[str, float]]:
    """While the model runs, also give each layer's input to the decoded weight: SNR by parameter name."""
    found: dict[str, float] = {}
    modules = dict(model.named_modules())
    handles = []
    for name, tensor in checkpoint.palettized.items():
        module = modules.get(name.removesuffix(".weight"))
        if name.endswith(".weight") and module is not None:
            handles.append(module.register_forward_hook(_comparer(found, name, tensor)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _comparer(found: dict[str, float], name: str, tensor: PalettizedTensor) -> Any:
    def compare(module: nn.Module, inputs: Any, output: Tensor) -> None:
        weight = module.get_parameter("weight")
        original = weight.data
        try:
            decoded = tensor.decode().to(original.dtype)
            weight.data = decoded.t() if is_conv1d(module) else decoded
            found[name] = snr_db(output, module.forward(*inputs))
        finally:
            weight.data = original

    return compare


def perplexity_of(logits: Sequence[Tensor], windows: Tensor) -> Perplexity:
    """Of windows int64 [windows, context] by their logits float [context, vocab_size] each."""
    return perplexity(token_losses(one, window) for one, window in zip(logits, windows, strict=True))


def distance_of(reference: Sequence[Tensor] | None, candidate: Sequence[Tensor] | None) -> Divergence | None:
    """Between the logits of two models on the same windows; None when one of them was not run."""
    if reference is None or candidate is None:
        return None
    return divergence(zip(reference, candidate, strict=True))
