"""Prompts as PaliGemma's tokenizer and openpi write them.

The tokenizer is a SentencePiece file of the user's (openpi downloads it from
gs://big_vision/paligemma_tokenizer.model).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openpi_opt.errors import UserError

_BINS = np.linspace(-1.0, 1.0, 257)[:-1]


class Tokenizer:
    """PaliGemma's SentencePiece model.

    Raises:
        UserError: sentencepiece is not installed, or the file is not such a model.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise UserError(
                "prompts need sentencepiece: pip install 'openpi_opt[robot]' (or sentencepiece)."
            ) from error
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"tokenizer={path}: there is no such file.")
        try:
            self.model: Any = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise UserError(f"tokenizer={path} is no SentencePiece model: {error}") from error

    def ids(self, prompt: str, state: NDArray[np.float64] | None = None) -> list[int]:
        """The ids of a prompt, without padding; with a normalised state [n] in pi05's format."""
        text = prompt.strip().replace("_", " ").replace("\n", " ")
        if state is None:
            return [*self.model.encode(text, add_bos=True), *self.model.encode("\n")]
        numbers = " ".join(str(number) for number in discretised(state))
        full = f"Task: {text}, State: {numbers};\nAction: "
        return list(self.model.encode(full, add_bos=True))


def discretised(state: NDArray[np.float64]) -> NDArray[np.int64]:
    """[n] in [-1, 1) -> 256 steps 0 to 255; what lies below is -1, above 255."""
    return np.digitize(state, _BINS) - 1
