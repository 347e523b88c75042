"""GPS inside somebody's own LightningModule, by a callback.

The module below knows nothing of fewtune: it trains whatever requires a gradient. The callback chooses two connections
of every neuron before the optimiser is made, attaches, and saves the task file at the end.

    python examples/lightning_module.py
"""

import tempfile
from pathlib import Path

import lightning.pytorch as pl
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import fewtune


class Digits(pl.LightningModule):
    """Somebody's own module: a backbone, a loss, an optimiser."""

    def __init__(self, model: torch.nn.Module, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """Cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over what requires a gradient."""
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class GPS(pl.Callback):
    """Attaches a selection before the optimiser is made, and saves the task file at the end."""

    def __init__(self, k: float, loader: DataLoader, path: Path) -> None:
        self.k, self.loader, self.path = k, loader, path

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Runs before `configure_optimizers`."""
        scores = fewtune.gradient_importance(module.model, self.loader)
        self.tuner = fewtune.attach(module.model, fewtune.select(scores, k=self.k))

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save, and leave a plain tuned model."""
        self.tuner.delta({"task": "digits 5 to 9"}).save(self.path)
        self.tuner.detach(keep=True)


def digits(low: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, 3, 32, 32] of five digits from `low`, and labels 0 to 4."""
    got = load_digits()
    chosen = (got.target >= low) & (got.target < low + 5)
    images = torch.tensor(got.images[chosen] / 8 - 1, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    return F.interpolate(images, size=32, mode="bilinear"), torch.tensor(got.target[chosen]) - low


def train(module: pl.LightningModule, loader: DataLoader, epochs: int, *callbacks: pl.Callback) -> None:
    """A quiet Trainer on the CPU."""
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module.train()
    trainer.fit(module, loader)


def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Fraction of right predictions."""
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean())


def main() -> None:
    """Pretrain on five digits, tune on the five others."""
    pl.seed_everything(0, verbose=False)
    model = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=5)
    first = TensorDataset(*digits(0))
    train(Digits(model, lr=1e-3), DataLoader(first, batch_size=32, shuffle=True), 16)
    print(f"digits 0 to 4, all weights trained: {accuracy(model, *first.tensors):.3f}")

    images, labels = digits(5)
    model.reset_classifier(5)
    loader = DataLoader(TensorDataset(images[:300], labels[:300]), batch_size=32, shuffle=True)
    with tempfile.TemporaryDirectory() as folder:
        gps = GPS(2, loader, Path(folder) / "task.safetensors")
        train(Digits(model, lr=1e-2), loader, 30, gps)
        tuned = accuracy(model, images[300:], labels[300:])
        share = 100 * gps.tuner.trained / gps.tuner.backbone_parameters
        size = gps.path.stat().st_size / 1000
        print(f"digits 5 to 9, GPS K=2: {tuned:.3f} on test images; {share:.1f} % trained; task file {size:.0f} kB")
    assert tuned > 0.7


if __name__ == "__main__":
    main()
