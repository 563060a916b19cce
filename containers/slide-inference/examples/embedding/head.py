"""A slide-level head over an embedding: gated attention (Ilse, Tomczak and Welling, Attention-based Deep Multiple
Instance Learning, 2018). Trained elsewhere, on features.h5 and the slides' labels; here it is turned into head.pt:

    python head.py <checkpoint.pth> <head.pt>"""

from __future__ import annotations

import sys

import torch


class GatedAttention(torch.nn.Module):
    """(n, d) of a slide's tiles to (k,), a probability per class, and the tiles' weights (n,), which sum to 1."""

    def __init__(self, dimensions: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.content = torch.nn.Linear(dimensions, hidden)
        self.gate = torch.nn.Linear(dimensions, hidden)
        self.score = torch.nn.Linear(hidden, 1)
        self.classifier = torch.nn.Linear(dimensions, classes)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.score(torch.tanh(self.content(features)) * torch.sigmoid(self.gate(features)))
        weights = torch.softmax(scores.squeeze(1), 0)
        return torch.softmax(self.classifier((weights.unsqueeze(1) * features).sum(0)), 0), weights


def head(state: dict[str, torch.Tensor]) -> GatedAttention:
    """The head that a checkpoint is of, with its weights."""
    hidden, dimensions = state["content.weight"].shape
    made = GatedAttention(dimensions, hidden, len(state["classifier.bias"]))
    made.load_state_dict(state)
    return made.eval()


if __name__ == "__main__":
    torch.jit.script(head(torch.load(sys.argv[1], weights_only=True))).save(sys.argv[2])
