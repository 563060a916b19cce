"""ResNet-18, -34 and -50 (He et al., Deep Residual Learning for Image Recognition, 2015) as an embedding: the 512
or 2048 numbers before the classifier. Layers and parameters are named as in torchvision, so that its weights, and
those of everybody who trained from them, load as they are. Plain PyTorch: torchvision is not needed."""

from __future__ import annotations

import sys

import torch

State = dict[str, torch.Tensor]
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class Basic(torch.nn.Module):
    """Two convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, inside: int, width: int, stride: int, downsample: torch.nn.Module) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(inside, width, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(width)
        self.relu = torch.nn.ReLU(inplace=True)
        self.conv2 = torch.nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class Bottleneck(torch.nn.Module):
    """Three convolutions beside a shortcut; the stride is the second's, as torchvision has it."""

    expansion = 4

    def __init__(self, inside: int, width: int, stride: int, downsample: torch.nn.Module) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(inside, width, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(width)
        self.conv2 = torch.nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(width)
        self.conv3 = torch.nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = torch.nn.BatchNorm2d(4 * width)
        self.relu = torch.nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class ResNet(torch.nn.Module):
    """(n, 3, h, w) to (n, 512), of ResNet-50 (n, 2048). `fc` is there so that a checkpoint loads; it is not run."""

    def __init__(self, depth: int, classes: int = 1000) -> None:
        super().__init__()
        block = Bottleneck if depth >= 50 else Basic
        self.inside = 64
        self.conv1 = torch.nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(64)
        self.relu = torch.nn.ReLU(inplace=True)
        self.maxpool = torch.nn.MaxPool2d(3, 2, 1)
        first, second, third, fourth = BLOCKS[depth]
        self.layer1 = self.layer(block, 64, first, 1)
        self.layer2 = self.layer(block, 128, second, 2)
        self.layer3 = self.layer(block, 256, third, 2)
        self.layer4 = self.layer(block, 512, fourth, 2)
        self.avgpool = torch.nn.AdaptiveAvgPool2d(1)
        self.fc = torch.nn.Linear(self.inside, classes)

    def layer(self, block: type[Basic | Bottleneck], width: int, blocks: int, stride: int) -> torch.nn.Sequential:
        layers = []
        for index in range(blocks):
            step = stride if index == 0 else 1
            outside = width * block.expansion
            downsample: torch.nn.Module = torch.nn.Identity()
            if step != 1 or self.inside != outside:
                downsample = torch.nn.Sequential(
                    torch.nn.Conv2d(self.inside, outside, 1, step, bias=False), torch.nn.BatchNorm2d(outside)
                )
            layers.append(block(self.inside, width, step, downsample))
            self.inside = outside
        return torch.nn.Sequential(*layers)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(tiles))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(self.avgpool(x), 1)


def network(state: State) -> torch.nn.Module:
    """The network that a checkpoint is of."""
    counts = tuple(len({key.split(".")[1] for key in state if key.startswith(f"layer{i}.")}) for i in range(1, 5))
    wide = "layer1.0.conv3.weight" in state
    for depth, blocks in BLOCKS.items():
        if counts == blocks and wide == (depth >= 50):
            return ResNet(depth, state["fc.weight"].shape[0])
    raise SystemExit("The checkpoint is of no ResNet-18, -34 or -50 with torchvision's names.")


if __name__ == "__main__":  # python network.py checkpoint.pth [depth]: random weights, to try the way with
    torch.manual_seed(0)
    torch.save(ResNet(int(sys.argv[2]) if len(sys.argv) > 2 else 50).state_dict(), sys.argv[1])
