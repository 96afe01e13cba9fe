"""The transformers class of a sentence-embedding model: an encoder with a pooling behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from nxm_export.contract.pooling import Pooling
from nxm_export.hf.protocols import ModelClass


def embedding_model(model_type: str, pooling: Pooling) -> ModelClass:
    """The transformers class of a sentence-embedding model: the family's encoder, and the pooling behind it.

    Parameters have the family's prefix, as in its other task models. The class has the encoder's own name, which
    ``config.json`` then tells other tools, because that is what a sentence-transformers directory holds.
    Long, because a class is made here: its bases are known only once transformers is loaded.
    """
    import inspect

    import torch
    import transformers
    from transformers.utils.generic import ModelOutput

    kind = type(transformers.AutoConfig.for_model(model_type))
    encoder = cast("type[transformers.PreTrainedModel]", transformers.MODEL_MAPPING[kind])
    options = (
        {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(encoder.__init__).parameters else {}
    )

    @dataclass
    class Output(ModelOutput):
        """`embedding` is (batch, hidden); `logits` is the same, under the name that training reads of any task."""

        loss: torch.Tensor | None = None
        embedding: torch.Tensor | None = None
        hidden_states: tuple[torch.Tensor, ...] | None = None

        @property
        def logits(self) -> torch.Tensor | None:
            return self.embedding

    base = cast("type[transformers.PreTrainedModel]", encoder.__bases__[0])

    class SentenceEmbedding(base):  # type: ignore[misc, valid-type]  # of the family: known once it runs
        """The encoder under the family's prefix, and `pooling`."""

        def __init__(self, config: transformers.PreTrainedConfig) -> None:
            super().__init__(config)
            self.pooling = pooling
            setattr(self, encoder.base_model_prefix, encoder(config, **options))
            self.post_init()

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            labels: torch.Tensor | None = None,
            **inputs: object,
        ) -> Output:
            """The embeddings. The mask is (batch, sequence) of 0 and 1, or, as in exported graphs, (batch, 1, 1,
            sequence) to be added to the scores. `labels`, scores of pairs, train nothing; they are taken because every
            batch has them."""
            states = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **inputs)
            tokens = states.last_hidden_state
            # Sums over a sentence and squares do not fit float16, whatever the encoder computes in.
            tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
            if pooling.mode == "cls":
                vector = tokens[:, 0]
            else:
                real = attention_mask if attention_mask.dim() == 2 else attention_mask[:, 0, 0, :] == 0
                real = real.to(tokens.dtype)[..., None]
                vector = (tokens * real).sum(dim=1) / real.sum(dim=1).clamp(
                    min=1.0
                )  # a row that is all padding gives 0
            if pooling.normalize:
                # Not functional.normalize: its ReduceL2 means another thing before opset 18.
                vector = vector / (vector * vector).sum(dim=-1, keepdim=True).sqrt().clamp(min=1e-12)
            return Output(embedding=vector, hidden_states=states.hidden_states)

    SentenceEmbedding.__name__ = encoder.__name__
    return cast(ModelClass, SentenceEmbedding)
