"""A small convolutional network over three classes: the shape of a tile classifier, not a trained one."""

from __future__ import annotations

import sys

import torch


class Classifier(torch.nn.Module):
    """(n, 3, h, w) to (n, 3): a probability per class. The softmax belongs inside, because Slideway adds none."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 7, stride=4),
            torch.nn.ReLU(),
            torch.nn.Conv2d(16, 32, 3, stride=2),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
        )
        self.head = torch.nn.Linear(32, 3)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.head(self.features(tiles)), dim=1)


def network() -> torch.nn.Module:
    return Classifier()


if __name__ == "__main__":  # python network.py checkpoint.pth: random weights, to try the way with
    torch.manual_seed(0)
    torch.save(network().state_dict(), sys.argv[1])
