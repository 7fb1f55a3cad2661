"""Training on the samples that matter (SwiftLearn, arXiv 2311.15134): those of the largest loss, chosen anew at times.

The published text names no formula. Our reading: with labels a sample's importance is EL2N, and each class keeps its
share; without labels, or with a loss of the user's own, it is the sample's loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrcompile.recovery.loss import Loss, probabilities_off, right
from lrcompile.recovery.samples import Samples
from lrcompile.recovery.settings import Recovery

WARM_UP_EPOCHS = 1  # on all samples
REFRESH_EPOCHS = 4  # epochs of the samples that are kept, after which any sample can come back
LEARNED = 0.9  # accuracy on the training samples below which the hardest ones alone mislead
DRAWN = 0.5  # the share of what is kept that is drawn at random then, and where there are no labels to tell


class Importance:
    """Chooses the samples of coming epochs."""

    def __init__(self, recovery: Recovery, samples: Samples) -> None:
        self.recovery = recovery
        self.samples = samples

    def is_due(self, epoch: int) -> bool:
        """Whether samples are chosen before this epoch."""
        return self.samples.mixed and epoch >= WARM_UP_EPOCHS and (epoch - WARM_UP_EPOCHS) % REFRESH_EPOCHS == 0

    def choose(self, loss: Loss, epoch: int, most: int) -> tuple[Tensor, str | None]:
        """(the numbers of the samples to train on, what the user should know); memory lasts for `most` at a time."""
        scores, hits = [], []
        whole = self.samples.training[0]
        with torch.no_grad():
            for numbers in torch.arange(len(whole)).split(min(self.samples.size, most)):
                batch = whole.take(numbers).to(loss.device)
                value = loss(batch)
                if batch.labels is not None and loss.own is None and loss.scores is not None:
                    value = probabilities_off(loss.scores, batch.labels)
                    hits.append(right(loss.scores, batch.labels))
                scores.append(value.cpu())
        accuracy = float(torch.cat(hits).float().mean()) if hits else None
        hard = accuracy is None or accuracy < LEARNED
        labels = whole.labels if hits and whole.labels is not None and whole.labels.dim() == 1 else None
        kept = most_important(
            torch.cat(scores), self.recovery.subset, labels, DRAWN if hard else 0.0, self.recovery.seed + epoch
        )
        if accuracy is None or not hard:
            return kept, None
        return kept, (
            f"less than {LEARNED:.0%} of the training samples were learned: a subset of the hardest would mislead, "
            f"so {DRAWN:.0%} of it was drawn at random"
        )


def most_important(importance: Tensor, share: float, classes: Tensor | None, drawn: float, seed: int) -> Tensor:
    """The numbers of the samples to keep, ascending.

    `share` of all, or of each of `classes` [samples]: the most important ones, `drawn` of them by chance instead.
    """
    chance = torch.Generator().manual_seed(seed % 2**63)
    groups = torch.zeros(len(importance), dtype=torch.long) if classes is None else classes
    kept = []
    for group in groups.unique():
        members = (groups == group).nonzero().flatten()
        count = max(1, round(share * len(members)))
        by_chance = round(drawn * count)
        ranked = members[importance[members].argsort(descending=True, stable=True)]
        rest = ranked[count - by_chance :]
        kept += [ranked[: count - by_chance], rest[torch.randperm(len(rest), generator=chance)[:by_chance]]]
    return torch.cat(kept).sort().values
