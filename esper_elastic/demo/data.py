"""What the three runs of the demo share: batches in one order, an honest accuracy, batch-norm statistics for a width.

Owns no network. Batches depend on the seed alone, so that baselines and the grown network see the same images in the same steps.

Shape legend: B batch, N images of a set; images are uint8 on the data set's side and float32, normalised, on the network's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..datasets import ImageData

EVALUATION_BATCH = 1000
RECALIBRATION_BATCHES = 10
RECALIBRATION_BATCH = 256


class Images:
    """A data set on one device, normalised with the training set's mean and deviation."""

    def __init__(self, data: ImageData, device: torch.device) -> None:
        self.name = data.name
        self.device = device
        sample = data.train_images[:10_000].float()
        self._mean, self._deviation = sample.mean().item(), sample.std().item()
        self._train_images, self._train_labels = data.train_images.to(device), data.train_labels.to(device)
        self.test_images, self.test_labels = data.test_images.to(device), data.test_labels.to(device)

    def prepare(self, images: Tensor) -> Tensor:
        """Normalised float images in channels_last. Shape: ``(B, 1, 28, 28)`` to the same."""
        return ((images.float() - self._mean) / self._deviation).contiguous(memory_format=torch.channels_last)

    def batches(self, num_steps: int, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``num_steps`` batches, each image once per pass over the set. Shape: ``(B, 1, 28, 28)`` and ``(B,)``."""
        generator = torch.Generator().manual_seed(seed)
        num_images = len(self._train_labels)
        batch_size = min(batch_size, num_images)
        order = torch.empty(0, dtype=torch.long)
        for _ in range(num_steps):
            if len(order) < batch_size:
                order = torch.randperm(num_images, generator=generator)
            chosen, order = order[:batch_size].to(self.device), order[batch_size:]
            yield self.prepare(self._train_images[chosen]), self._train_labels[chosen]


@torch.no_grad()
def accuracy(network: nn.Module, images: Images, limit: int | None = None) -> float:
    """Percent of the first ``limit`` test images (all by default) that ``network`` labels rightly, in eval mode; its mode is restored."""
    training = network.training
    network.eval()
    right = 0
    labels = images.test_labels[:limit]
    for start in range(0, len(labels), EVALUATION_BATCH):
        batch = images.prepare(images.test_images[start : start + EVALUATION_BATCH][: len(labels) - start])
        right += int((network(batch).argmax(1) == labels[start : start + EVALUATION_BATCH]).sum())
    network.train(training)
    return 100 * right / len(labels)


@torch.no_grad()
def recalibrate(network: nn.Module, images: Images, seed: int = 0) -> None:
    """Measure batch-norm statistics anew for the width that ``network`` has now: means and variances depend on who else is active.

    Effects: overwrites the running statistics of the active channels with their average over a few training batches; nothing else.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    training = network.training
    network.train()
    for count, (batch, _) in enumerate(images.batches(RECALIBRATION_BATCHES, RECALIBRATION_BATCH, seed), start=1):
        for norm in norms:
            norm.momentum = 1 / count
        network(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.train(training)
