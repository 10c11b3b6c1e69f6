"""A Core ML package that makes embeddings, as the verifier sees it."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from converters.coreml.format import EMBEDDING, TEXT, TEXT_MASK
from converters.coreml.read.description import Description
from converters.coreml.read.package import Package
from converters.coreml.read.package_files import PackageFiles
from converters.coreml.read.runtime import RuntimePackage
from edkm_export.artifact.encodings import CLOSE, Encode, Encoding, TextTokens
from edkm_export.errors import InputError, PackageError
from edkm_export.quantities import short_size

__all__ = ["CoreMLEmbeddingArtifact"]


class CoreMLEmbeddingArtifact(PackageFiles):
    """A model in one package: `input_ids` and `attention_mask` of a fixed length to `sentence_embedding`.

    Args:
        packages: the one package.
        description: how it is called.

    Raises:
        PackageError: the package is not what the description says.
    """

    def __init__(self, packages: Sequence[Package], description: Description) -> None:
        super().__init__(packages, description)
        if len(packages) != 1:
            raise PackageError(f"{self.path}: an embedding model is one package, not {len(packages)}.")
        self._package = packages[0]
        self._check_interface()
        drawn = self.drawn_words()
        self.encodings = (
            *(
                Encoding(
                    f"execution-{precision}",
                    f"our interpreter of Core ML programs, {CLOSE[precision].words}{drawn}",
                    CLOSE[precision],
                    self._interpreted(precision),
                )
                for precision in ("float32", "rounded")
            ),
            self._apple_runtime(),
        )

    def __repr__(self) -> str:
        """One line: package, interface, size."""
        return f"CoreMLEmbeddingArtifact({self.path.name}, {short_size(self.size_bytes())})"

    def _check_interface(self) -> None:
        function = self._package.functions[self._package.default_function]
        shape = (1, self.context)
        wanted = {TEXT: shape, TEXT_MASK: shape}
        found = {name: value.type.fixed_shape for name, value in function.inputs.items()}
        if found != wanted or EMBEDDING not in function.outputs:
            raise PackageError(
                f"{self.path}: takes {', '.join(function.inputs)} and gives {', '.join(function.outputs)}; expected "
                f"{TEXT} and {TEXT_MASK} int32 [1, {self.context}], and {EMBEDDING}; export it again."
            )

    def _interpreted(self, precision: str) -> Encode:
        return self._encoding(
            lambda inputs: self._package.run(inputs, function=None, state=None, precision=precision)
        )

    def _apple_runtime(self) -> Encoding:
        """The package in Apple's own runtime; macOS only."""
        encode, missing = None, f"needs macOS, this is {platform.system()}"
        if platform.system() == "Darwin":
            runtime = RuntimePackage(self.path)
            encode, missing = self._encoding(lambda inputs: runtime.run(inputs)), ""
        why = "only Apple's own runtime shows what its compiler and compute units do"
        return Encoding(
            "execution-apple",
            "Apple's Core ML runtime (macOS)",
            CLOSE["rounded"].because(why),
            encode,
            missing,
        )

    def _encoding(self, run: Callable[[dict[str, Tensor]], dict[str, Any]]) -> Encode:
        def encode(texts: Sequence[TextTokens]) -> Tensor:
            return torch.cat([self._vector(run, text) for text in texts])

        return encode

    def _vector(self, run: Callable[[dict[str, Tensor]], dict[str, Any]], text: TextTokens) -> Tensor:
        """float32 [1, dimension]."""
        count = len(text.ids)
        if count > self.context:
            raise InputError(
                f"{self.path}: a text has {count} tokens, more than its {self.context} positions."
            )
        ids = torch.zeros(1, self.context, dtype=torch.int32)
        mask = torch.zeros_like(ids)
        ids[0, :count], mask[0, :count] = text.ids.int(), 1
        mask[0, : text.prompt] = 2
        found: Tensor | None = run({TEXT: ids, TEXT_MASK: mask}).get(EMBEDDING)
        if found is None or found.dim() != 2:
            raise PackageError(f"{self.path}: has no output {EMBEDDING!r} of rank 2; export it again.")
        return found.float()
