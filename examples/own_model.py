"""fewtune on a module of your own, with nothing but torch: the head is named, or its absence said.

python examples/own_model.py
"""

import torch
from torch import nn

import fewtune


class Backbone(nn.Module):
    """Any module will do: layers are told by their classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, kernel_size=4, stride=4)
        self.norm = nn.GroupNorm(1, 16)
        self.mixer = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.GELU(), nn.Conv2d(16, 16, 1))
        self.head = nn.Linear(16, classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(images))
        return (x + self.mixer(x)).mean((2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


def main() -> None:
    torch.manual_seed(0)
    model = Backbone(classes=3)
    labels = torch.arange(96) % 3
    images = torch.randn(96, 3, 16, 16) + labels.view(-1, 1, 1, 1)
    batches = [(images[i : i + 32], labels[i : i + 32]) for i in range(0, 96, 32)]

    objective = fewtune.SupCon(features=lambda model, images: model.features(images))
    scores = fewtune.gradient_importance(model, batches, objective=objective, head="head")
    selection = fewtune.select(scores, k=2)
    print(selection.summary())

    tuner = fewtune.attach(model, selection)
    optimizer = torch.optim.AdamW(tuner.param_groups(lr=1e-2, head_lr=3e-2), weight_decay=0.05)
    for epoch in range(20):
        for x, y in batches:
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % 5 == 4:
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    tuner.detach(keep=True)
    print(f"detached: {type(model.mixer[0]).__name__} again, with the tuned weights in it")


if __name__ == "__main__":
    main()
