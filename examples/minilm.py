"""A sentence encoder with its trained weights, for the command line:

    lrcompile examples.minilm:model --calib examples.minilm:calibration --target v100 --out minilm_lr.onnx

Run it from the repository's root, after `make data`.
"""

from __future__ import annotations

from torch import Tensor, nn

from tools import models

SEQ = 128


def model() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """MiniLM-L6 and a batch of eight sentences."""
    return models.minilm(SEQ)


def calibration() -> dict[str, Tensor]:
    """64 sentences that the accuracy below is not judged on."""
    ids, mask = models.tokenise(models.movie_sentences()[0][:64], SEQ)
    return {"input_ids": ids, "attention_mask": mask}


def accuracy(encoder: nn.Module) -> float:
    """How well a linear probe on the embeddings finds the sign of a sentence's sentiment."""
    return models.sentiment_accuracy(encoder, seq=SEQ)
