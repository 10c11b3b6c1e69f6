"""A folder of sentence-transformers: its account, and the embedding model that it holds."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edkm_export.embedding_settings import EmbeddingSettings
from edkm_export.reference.account import Account
from edkm_export.reference.config_fields import sort_fields
from edkm_export.reference.hf_folder import HfFolder, stored_dtype
from edkm_export.reference.placement import Placement
from edkm_export.reference.sentence_files import SentenceFiles, read_sentence_files
from edkm_export.reference.stored_tensors import StoredTensors, read_stored

if TYPE_CHECKING:
    import torch

__all__ = ["SentenceFolder"]

# Of the classes that a model may have been saved with: what they have on top of the token vectors.
_HEADS = re.compile(r"(bert\.)?pooler\.|cls\.|lm_head\.|(head|decoder)\.(dense|norm|weight|bias)")
_HEAD = "a head on top of the token vectors, which sentence-transformers does not use"
_PLACES = "embeddings.position_ids"


@dataclasses.dataclass(frozen=True)
class SentenceFolder(HfFolder):
    """A Hugging Face folder with modules.json beside config.json."""

    def account(self) -> Account:
        """What becomes of every tensor and every field, those of the sentence-transformers files included.

        Raises:
            InputError: files are missing, damaged or pickles.
        """
        config = self._read_config()
        fields = sort_fields(config, embeds=True)
        stored = read_stored(self.path, self.reference)
        refused = {**stored.not_understood, **fields.not_understood}
        without_effect = {**fields.without_effect, **stored.without_effect}
        if "quantization_config" in config:
            refused["quantization_config"] = "quantized weights of an embedding model are not read"
        used, names = dict(fields.used), tuple(stored.tensors)
        if not fields.not_understood:
            files = self._files
            refused |= files.not_understood
            without_effect |= files.without_effect
            used |= files.used
            placed = self._placed(stored)
            refused |= {**placed.not_understood, **placed.missing()}
            without_effect |= placed.without_effect
            names = tuple(name for name in names if name not in without_effect)
            for prefix, dense in self._dense.items():
                expected = self._dense_shapes(prefix)
                found = {name: tensor.shape for name, tensor in dense.tensors.items()}
                names += tuple(f"{dense.files[0].parent.name}/{name}" for name in found)
                refused |= {
                    f"{dense.files[0].parent.name}/{name}": f"is {_shape(found.get(name))}, and its config.json gives "
                    f"{_shape(expected.get(name))}"
                    for name in {**expected, **found}
                    if found.get(name) != expected.get(name)
                }
        return Account(
            source=self.reference,
            kind=f"sentence-transformers folder ({config.get('model_type')})",
            tensors=tuple(name for name in names if name not in refused),
            settings=used,
            without_effect=without_effect,
            not_understood=refused,
            origin=self.origin(),
        )

    def settings(self) -> EmbeddingSettings:
        """Pooling and what follows.

        Raises:
            SourceError: a module or a field is not understood.
        """
        found = self._files
        Account(self.reference, "", not_understood=found.not_understood).require_understood()
        assert found.settings is not None
        return found.settings

    def load_model(
        self, dtype: torch.dtype | None = None, advance: Callable[[int], None] | None = None
    ) -> Any:
        """The embedding model in eval mode, on the CPU.

        Args:
            dtype: of the weights; None: bfloat16 or float16 where all are stored so, else float32.
            advance: called with numbers of parameters that were read.

        Returns:
            SentenceModel.

        Raises:
            SourceError: a part of the folder is not understood.
            InputError: files are missing or damaged.
        """
        self.account().require_understood()
        stored = read_stored(self.path, self.reference)
        kind = dtype or stored_dtype(stored)
        model = self._model(self.settings())
        state = {}
        places = [(name, stored, held) for name, held in self._placed(stored).places.items()]
        places += [
            (f"{prefix}.{name.removeprefix('linear.')}", dense, name)
            for prefix, dense in self._dense.items()
            for name in dense.tensors
        ]
        for name, file, held in places:
            state[name] = file.read(held).to(kind)
            if advance is not None:
                advance(state[name].numel())
        model.load_state_dict(state, assign=True)
        return model.eval().requires_grad_(False)

    def outline(self) -> Any:
        """The embedding model on the meta device."""
        return self._model(self.settings())

    @cached_property
    def _files(self) -> SentenceFiles:
        given = self._read_config()
        config = self._built_config(given, sort_fields(given, embeds=True), None, untied=False)
        return read_sentence_files(
            self.path,
            self.reference,
            hidden_size=int(config.hidden_size),
            positions=int(config.max_position_embeddings),
        )

    @cached_property
    def _dense(self) -> dict[str, StoredTensors]:
        """Weights of the dense layers by the prefix of their names in the model."""
        return {
            prefix: read_stored(path, f"{self.reference}/{path.name}")
            for prefix, path in self._files.dense.items()
        }

    def _dense_shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        layer = self._files.layers[prefix]
        shapes: dict[str, tuple[int, ...]] = {"linear.weight": (layer.out_features, layer.in_features)}
        if layer.bias:
            shapes["linear.bias"] = (layer.out_features,)
        return shapes

    def _has_own_head(self, config: Any, fields: Any, stored: Any) -> bool:
        return False

    def _model(self, settings: EmbeddingSettings) -> Any:
        """Without weights, but with its constants."""
        import accelerate

        from edkm_export.reference.sentence_model import SentenceModel

        config = self.config(weights=False)
        with accelerate.init_empty_weights(include_buffers=False):
            return SentenceModel(config, settings)

    def _placed(self, stored: StoredTensors) -> Placement:
        """Where the tensors of the model itself belong."""
        bare = EmbeddingSettings(pooling="mean", max_tokens=1)
        placed = Placement.of(self._model(bare), stored, set())
        for name in list(placed.not_understood):
            if name in placed.places.values():
                continue
            if _HEADS.match(name):
                placed.without_effect[name] = _HEAD
            elif name.endswith(_PLACES) and _counts(stored.read(name)):
                placed.without_effect[name] = "the numbers of the positions, which older versions saved"
            else:
                continue
            del placed.not_understood[name]
        return placed

    def config(self, *, weights: bool = True) -> Any:
        """The `PretrainedConfig` without fields that nothing reads; see `HfFolder`."""
        config = self._read_config()
        fields = sort_fields(config, embeds=True)
        Account(self.reference, "", not_understood=fields.not_understood).require_understood()
        stored = read_stored(self.path, self.reference) if weights else None
        return self._built_config(config, fields, stored, untied=False)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _counts(tensor: Any) -> bool:
    """Whether a tensor holds 0, 1, 2, ..."""
    import torch

    flat = tensor.reshape(-1)
    return bool(torch.equal(flat, torch.arange(len(flat), dtype=flat.dtype)))
