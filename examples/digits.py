"""fewtune in a plain training loop: a vision transformer learns the digits 5 to 9 with a few of its weights.

There are no weights to download: the "pretrained" backbone is trained here on the digits 0 to 4 first (scikit-learn's
handwritten digits, 8 x 8). Runs in less than a minute on one core:

    python examples/digits.py
"""

import tempfile
import time
from pathlib import Path

import timm
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

import fewtune


def digits(wanted: list[int]) -> tuple[DataLoader, DataLoader]:
    """Loaders of (images [batch, 1, 16, 16], labels) of some digits, for training and for test."""
    images, labels = load_digits(return_X_y=True)
    chosen = [i for i, label in enumerate(labels) if label in wanted]
    x = torch.tensor(images[chosen], dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    x = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
    y = torch.tensor([wanted.index(labels[i]) for i in chosen])
    parts = train_test_split(x, y, test_size=0.5, random_state=0, stratify=y)
    train, test = TensorDataset(parts[0], parts[2]), TensorDataset(parts[1], parts[3])
    generator = torch.Generator().manual_seed(0)
    return DataLoader(train, batch_size=64, shuffle=True, generator=generator), DataLoader(test, batch_size=256)


def train(model: torch.nn.Module, parameters: list, loader: DataLoader, epochs: int, lr: float) -> None:
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for _ in range(epochs):
        for images, labels in loader:
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: torch.nn.Module, loader: DataLoader) -> float:
    right = torch.cat([model(images).argmax(1) == labels for images, labels in loader])
    return 100 * right.float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", in_chans=1, img_size=16, patch_size=4, depth=4, embed_dim=64, num_heads=4, num_classes=5
    )
    old_train, old_test = digits([0, 1, 2, 3, 4])
    train(model, list(model.parameters()), old_train, epochs=25, lr=3e-3)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"digits 0 to 4, all {parameters:,} parameters: {accuracy(model, old_test):.1f} %")

    new_train, new_test = digits([5, 6, 7, 8, 9])
    model.reset_classifier(5)
    backbone = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    scores = fewtune.gradient_importance(model, new_train, objective=fewtune.SupCon(temperature=0.07), head="head")
    selection = fewtune.select(scores, k=1, granularity="neuron")
    print(selection.summary())

    tuner = fewtune.attach(model, selection)
    start = time.perf_counter()
    train(model, tuner.parameters(), new_train, epochs=30, lr=1e-2)
    seconds = time.perf_counter() - start
    print(f"digits 5 to 9, {tuner.trained:,} parameters, {seconds:.1f} s: {accuracy(model, new_test):.1f} %")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits-5-to-9.safetensors"
        tuner.delta(metadata={"classes": ["5", "6", "7", "8", "9"]}).save(path)
        tuner.detach(keep=False)
        assert all(torch.equal(tensor, backbone[name]) for name, tensor in model.state_dict().items())

        delta = fewtune.load_delta(path)
        print(f"the task file: {path.stat().st_size:,} bytes; detached, the model is what it was, bit for bit")
        with delta.applied_to(model):
            print(f"with the task file applied: {accuracy(model, new_test):.1f} %")
        print(f"reverted: {accuracy(model, new_test):.1f} % (chance: 20 %)")


if __name__ == "__main__":
    main()
