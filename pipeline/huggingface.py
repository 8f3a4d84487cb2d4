"""A local Hugging Face folder (config.json and safetensors) as an `Exportable`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from ..calibrate.errors import ModelError, UnsupportedError
from .exportable import Exportable

_BATCH, _LENGTH = 2, 16
_RESULTS = ("logits", "last_hidden_state", "image_embeds", "text_embeds")


class _PlainOutputs(torch.nn.Module):
    """The model with tensors in and one tensor out: logits if it has a head, else the last hidden state."""

    def __init__(self, model: Any, names: tuple[str, ...], result: str) -> None:
        super().__init__()
        self.model = model
        self._names = names
        self._result = result

    def forward(self, first: torch.Tensor, second: torch.Tensor | None = None) -> torch.Tensor:
        """Run the model on its inputs, in the order of their names."""
        given = [first] if second is None else [first, second]
        result = self.model(**dict(zip(self._names, given, strict=True)), return_dict=True)
        return torch.as_tensor(getattr(result, self._result))


def load_folder(folder: Path, axes: dict[str, dict[int, str]]) -> Exportable:
    """Load the architecture that config.json names, from safetensors only.

    Raises:
        ModelError: The weights are missing or do not fit.
        UnsupportedError: The architecture is unknown, or takes neither token ids nor pixels.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = _class_of(config).from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="eager",
            dtype=torch.float32,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        raise ModelError(
            "the folder holds no loadable model",
            where=str(folder),
            found=reason[0] if reason else type(error).__name__,
            expected="config.json and *.safetensors of an architecture that transformers knows",
        ) from error
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False
    example, dynamic = _example(model)
    wrapped = _PlainOutputs(model.eval(), tuple(example), _result_name(model, example))
    return Exportable(module=wrapped, example=example, dynamic=axes or dynamic, outputs=(wrapped._result,))


def _class_of(config: Any) -> Any:
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return transformers.AutoModel


def _example(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, str]]]:
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "input_ids":
        ids = torch.randint(1, model.config.vocab_size, (_BATCH, _LENGTH), generator=generator)
        axes = {0: "batch", 1: "sequence"}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {"input_ids": axes, "attention_mask": axes}
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        pixels = torch.randn((_BATCH, getattr(model.config, "num_channels", 3), size, size), generator=generator)
        return {"pixel_values": pixels}, {"pixel_values": {0: "batch"}}
    raise UnsupportedError(
        "no example inputs are known for this architecture",
        where=type(model).__name__,
        found=model.main_input_name,
        expected="input_ids or pixel_values",
        do="write a factory that returns (module, example), and export file.py:factory",
    )


def _result_name(model: Any, example: dict[str, torch.Tensor]) -> str:
    with torch.no_grad():
        result = model(**example, return_dict=True)
    for name in _RESULTS:
        if getattr(result, name, None) is not None:
            return name
    raise UnsupportedError(
        "the model gives none of the known results", where=type(model).__name__, expected=", ".join(_RESULTS)
    )
