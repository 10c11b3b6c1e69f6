"""Intermediate values of hard PyTorch, with the modules that they belong to."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edkm_export.kv_cache import FLOAT, KVCache
from edkm_export.reference.caching import new_cache, run_cached

__all__ = ["Site", "record_sites"]

_OBSERVED = "edkm_observed"  # name of our attention function in the registry of transformers


@dataclass(frozen=True, eq=False)
class Site:
    """One value on the way from tokens to logits.

    Attributes:
        module: the module that is to blame when this value is the first to be wrong.
        words: what it is.
        role: the same for the same place of every layer.
        value: float32 [positions, channels], or [heads, positions, channels] for queries and keys.
        stem: everything computed before it goes into it.
    """

    module: str
    words: str
    role: str
    value: Tensor
    stem: bool


@torch.no_grad()
def record_sites(model: Any, tokens: Tensor, cached: int = 0, kv_cache: KVCache = FLOAT) -> list[Site]:
    """Run a model of transformers and record its values, in the order in which they are computed.

    Args:
        model: with eager attention.
        tokens: int64 [positions].
        cached: so many of them are fed first and not recorded.
        kv_cache: how it holds keys and values.
    """
    cache = new_cache(model, kv_cache)
    if cached:
        run_cached(model, tokens[None, :cached], cache)
    recorder = _Recorder(model)
    with recorder.hooked():
        run_cached(model, tokens[None, cached:], cache)
    return recorder.sites


class _Recorder:
    """Collects sites while the model runs."""

    def __init__(self, model: Any) -> None:
        self.sites: list[Site] = []
        self._model = model
        self._names = {module: name for name, module in model.named_modules()}
        self._rotary = next((name for name in self._names.values() if name.endswith("rotary_emb")), "")
        # Outputs by memory and shape; held, so that no other tensor takes that memory.
        self._made: dict[tuple[int, torch.Size], tuple[str, Tensor]] = {}

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        for module in self._names:
            if "weight" in dict(module.named_parameters(recurse=False)):
                handles.append(module.register_forward_pre_hook(self._input))
            handles.append(module.register_forward_hook(self._output))
        try:
            with self._observed_attention():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _input(self, module: nn.Module, inputs: Any) -> None:
        value = inputs[0]
        name = self._names[module]
        if not value.is_floating_point():
            return
        made = self._made.get((value.data_ptr(), value.shape))
        parent = name.rpartition(".")[0]
        # What a norm outside of attention reads is the residual stream, or all of attention or MLP. One of a per-layer
        # embedding is not as wide, and reads nothing but the tokens.
        weight = module.get_parameter("weight")
        stem = weight.dim() == 1 and "attn" not in parent and len(weight) == self._model.config.hidden_size
        if made is None or stem:
            self._add(made[0] if made else parent, f"what goes into {name}", name, value, stem)

    def _output(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return
        name = self._names[module]
        if "weight" in dict(module.named_parameters(recurse=False)):
            self._add(name, f"the output of {name}", name, value, name == "lm_head")
        self._made.setdefault((value.data_ptr(), value.shape), (name, value))

    def _add(self, module: str, words: str, name: str, value: Tensor, stem: bool) -> None:
        role = ".".join("*" if part.isdigit() else part for part in name.split(".")) + words.split(name)[0]
        self.sites.append(Site(module, words, role, value[0].float().clone(), stem))

    def _attention(self, module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **more: Any) -> Any:
        name = self._names[module]
        blamed = self._rotary or name
        new = query.shape[2]
        self._add(blamed, f"the rotated queries of {name}", name, query, False)
        self._add(blamed, f"the rotated keys of {name}", name, key[:, :, -new:], False)
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, query, key, *rest, **more)

    @contextlib.contextmanager
    def _observed_attention(self) -> Iterator[None]:
        """Let attention pass through our function, by the registry that transformers has for that."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        config = self._model.config
        before = config._attn_implementation
        AttentionInterface.register(_OBSERVED, self._attention)
        AttentionMaskInterface.register(_OBSERVED, eager_mask)
        config._attn_implementation = _OBSERVED
        try:
            yield
        finally:
            config._attn_implementation = before
