"""GPS inside a Hugging Face Trainer, by a callback.

A small ViT learns scikit-learn's handwritten digits 0 to 4 whole; then GPS tunes two connections of every neuron, the
biases and a new head on the digits 5 to 9. The callback selects and attaches before the Trainer makes its optimiser,
and saves the task file at the end; the Trainer itself is the stock one.

    python examples/huggingface_trainer.py
"""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import fewtune


class GPS(TrainerCallback):
    """Selects K connections of every neuron and tunes only these."""

    def __init__(self, k: float, loader: DataLoader, path: Path) -> None:
        self.k, self.loader, self.path = k, loader, path
        self.tuner: fewtune.Tuner | None = None

    def attach(self, model: torch.nn.Module) -> list[dict]:
        """Before the Trainer is made: what its optimiser shall step."""
        objective = fewtune.SupCon(features=lambda model, x: model.vit(x).last_hidden_state[:, 0])
        selection = fewtune.select(fewtune.gradient_importance(model, self.loader, objective), k=self.k)
        self.tuner = fewtune.attach(model, selection)
        return self.tuner.param_groups()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Save the task file, and leave a plain tuned model."""
        assert self.tuner is not None
        self.tuner.delta({"task": "digits 5 to 9"}).save(self.path)
        self.tuner.detach(keep=True)


def digits(low: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, 1, 8, 8] of five digits from `low`, and labels 0 to 4."""
    got = load_digits()
    chosen = (got.target >= low) & (got.target < low + 5)
    images = torch.tensor(got.images[chosen] / 8 - 1, dtype=torch.float32)[:, None]
    return images, torch.tensor(got.target[chosen]) - low


def rows(images: torch.Tensor, labels: torch.Tensor) -> list[dict]:
    """What a Trainer wants."""
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Fraction of right predictions."""
    with torch.no_grad():
        return float((model.eval()(images).logits.argmax(1) == labels).float().mean())


def trainer(model: torch.nn.Module, data: list[dict], folder: str, epochs: int, **options: object) -> Trainer:
    """The stock Trainer, on the CPU, without logs and checkpoints."""
    arguments = TrainingArguments(
        folder, num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=3e-3, weight_decay=0.0,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data, **options)


def main() -> None:
    """Pretrain on five digits, tune on the five others."""
    set_seed(0)
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, hidden_size=48, num_hidden_layers=3,
                       num_attention_heads=4, intermediate_size=96, num_labels=5)  # fmt: skip
    model = ViTForImageClassification(config)
    with tempfile.TemporaryDirectory() as folder:
        trainer(model, rows(*digits(0)), folder, epochs=8).train()
        print(f"digits 0 to 4, all weights trained: {accuracy(model, *digits(0)):.3f}")

        images, labels = digits(5)
        train, test = slice(0, 300), slice(300, None)
        torch.nn.init.zeros_(model.classifier.weight)
        torch.nn.init.zeros_(model.classifier.bias)
        loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=64, shuffle=True)
        gps = GPS(2, loader, Path(folder) / "task.safetensors")
        groups = gps.attach(model)
        optimizer = torch.optim.Adam(groups, lr=1e-2)
        tuning = trainer(
            model, rows(images[train], labels[train]), folder, epochs=30, callbacks=[gps], optimizers=(optimizer, None)
        )
        tuning.train()
        tuned = accuracy(model, images[test], labels[test])
        share = 100 * gps.tuner.trained / gps.tuner.backbone_parameters
        size = gps.path.stat().st_size / 1000
        print(f"digits 5 to 9, GPS K=2: {tuned:.3f} on test images; {share:.1f} % trained; task file {size:.0f} kB")
    assert tuned > 0.7


if __name__ == "__main__":
    main()
