"""all-MiniLM-L6-v2 as one module from token ids to unit sentence embeddings."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ...calibrate.errors import EnvironmentError_
from ..outliers import PlantSite


class SentenceEncoder(nn.Module):
    """BERT encoder, mean over the unmasked tokens, unit length.

    Args:
        folder: Local folder with `config.json` and `model.safetensors`; nothing is ever downloaded.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        try:
            from safetensors.torch import load_file
            from transformers import BertConfig, BertModel
        except ImportError as error:
            raise EnvironmentError_("transformers is missing", do="pip install 'qpipe[models]'") from error
        # Eager attention exports to plain MatMul and Softmax, which is what a quantizer has to see.
        config = BertConfig.from_pretrained(folder, local_files_only=True, attn_implementation="eager")
        self.bert = BertModel(config, add_pooling_layer=False)
        weights = load_file(folder / "model.safetensors")
        self.bert.load_state_dict({name: weights[name] for name in self.bert.state_dict()})

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return `sentence_embedding` [n, 384] of `input_ids` and `attention_mask` [n, tokens]."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=1)

    def outlier_sites(self) -> list[PlantSite]:
        """Return all LayerNorms but the last, whose output is the result."""
        sites = []
        norm = self.bert.embeddings.LayerNorm
        for layer in self.bert.encoder.layer:
            attention = layer.attention
            projections = (attention.self.query, attention.self.key, attention.self.value)
            sites.append(PlantSite(norm=norm, readers=projections, residual=attention.output))
            sites.append(
                PlantSite(norm=attention.output.LayerNorm, readers=(layer.intermediate.dense,), residual=layer.output)
            )
            norm = layer.output.LayerNorm
        return sites
