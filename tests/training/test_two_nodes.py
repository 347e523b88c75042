"""Runs over two nodes: two launchers that know of each other by an address alone, as on two machines.

The same in two network namespaces, as superuser: `FEWTUNE_NAMESPACES=1 pytest tests/training/test_two_nodes.py`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fewtune.tasks import fit
from runs import arguments, coloured_folder, fewtune, tiny_recipe

pytestmark = pytest.mark.slow
TIMEOUT = 240
NAMESPACES = ("fewtune-a", "fewtune-b") if os.environ.get("FEWTUNE_NAMESPACES") else ()
ADDRESS = "10.77.0.1" if NAMESPACES else "127.0.0.1"
SETTINGS: dict[str, Any] = {"importance": "magnitude", "augment": "fgvc", "ema": 0.9, "optimizer": "sgd", "lr": 0.05}
"""By magnitude, since a contrastive batch of 4 is not one of 8; by SGD, since Adam divides rounding noise by itself
where a gradient is zero."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module", autouse=True)
def network() -> Iterator[None]:
    """Two namespaces with a cable between them, where they are asked for."""
    if not NAMESPACES:
        yield
        return
    first, second = NAMESPACES
    for line in (
        f"netns add {first}", f"netns add {second}", "link add fewtune-0 type veth peer name fewtune-1",
        f"link set fewtune-0 netns {first}", f"link set fewtune-1 netns {second}",
        f"-n {first} addr add 10.77.0.1/24 dev fewtune-0", f"-n {second} addr add 10.77.0.2/24 dev fewtune-1",
        f"-n {first} link set fewtune-0 up", f"-n {second} link set fewtune-1 up",
        f"-n {first} link set lo up", f"-n {second} link set lo up",
    ):  # fmt: skip
        subprocess.run(["ip", *line.split()], check=True)
    yield
    for name in NAMESPACES:
        subprocess.run(["ip", "netns", "del", name], check=True)


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def nodes(out: Path, *fit_arguments: str) -> list[subprocess.Popen[str]]:
    """`fewtune fit` of one process on each of two nodes, begun."""
    port, started = free_port(), []
    for rank in (0, 1):
        inside = ["ip", "netns", "exec", NAMESPACES[rank]] if NAMESPACES else []
        device = {"GLOO_SOCKET_IFNAME": f"fewtune-{rank}"} if NAMESPACES else {}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank)]
        launcher += ["--nproc-per-node", "1", "--master-addr", ADDRESS, "--master-port", str(port)]
        command = [*inside, *launcher, "-m", "fewtune", "fit", *fit_arguments, "--out", str(out)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, start_new_session=True, env=os.environ | device, **pipes))
    return started


def spread(images: Path, strategy: str, **changes: Any) -> list[str]:
    """Arguments of two processes with batches of 4, which see the images of one with batches of 8."""
    settings = {**SETTINGS, **changes, "num_nodes": 2, "devices": 1, "strategy": strategy, "batch_size": 4}
    return arguments(images, **settings)


def processes_below(parent: int) -> list[int]:
    """Ids of the processes that a process has begun, and of those that these have (Linux)."""
    children = [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    return [each for child in children for each in (child, *processes_below(child))]


def history(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "history.json").read_text())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_nodes_train_what_one_process_trains(images: Path, tmp_path: Path, strategy: str) -> None:
    """Gradients are summed in another order: 1e-4 of the largest value."""
    one = fit(tiny_recipe(images, **SETTINGS), tmp_path / "one")
    two = tmp_path / "two"
    begun = nodes(two, *spread(images, strategy), "--json")
    printed = [node.communicate(timeout=TIMEOUT) for node in begun]
    assert [node.returncode for node in begun] == [0, 0], printed
    metrics = json.loads((two / "metrics.json").read_text())
    assert metrics["trained"] == one.metrics["trained"]
    assert '"trained"' in printed[0][0]
    assert '"trained"' not in printed[1][0]  # one node speaks
    assert metrics["test"]["images"] == one.metrics["test"]["images"]
    states = [
        torch.load(folder / "checkpoint.ckpt", weights_only=True)["state_dict"]["values"]
        for folder in (one.folder.path, two)
    ]
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], rtol=1e-4, atol=1e-4 * float(value.abs().max())), name
    for first, second in zip(history(one.folder.path), history(two), strict=True):
        assert second["val_loss"] == pytest.approx(first["val_loss"], rel=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_lost_node_ends_the_other_and_the_run_goes_on(images: Path, tmp_path: Path, strategy: str) -> None:
    """Node 1 is killed within an epoch; node 0 says so and ends; the run then goes on in one process."""
    out, epochs = tmp_path / "run", 12
    first, second = nodes(out, *spread(images, strategy, epochs=epochs))
    for _ in range(TIMEOUT * 20):
        if (out / "history.json").exists() and len(history(out)) >= 2:
            break
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    for worker in processes_below(second.pid):
        os.kill(worker, signal.SIGKILL)
    second.communicate(timeout=TIMEOUT)
    _, said = first.communicate(timeout=TIMEOUT)
    assert first.returncode != 0
    assert not (out / "metrics.json").exists()
    line = next(line for line in said.splitlines() if line.startswith("error: "))
    assert "process 0 of 2 lost another one" in line
    assert f"fewtune fit --resume --out {out}" in line
    done = len(history(out))
    assert f"goes on after epoch {done}" in line
    again = fewtune("fit", "--resume", *arguments(images, **SETTINGS, epochs=epochs, batch_size=4), "--out", out)
    assert again.returncode == 0, again.stderr
    assert [entry["epoch"] for entry in history(out)] == list(range(epochs))
    assert (out / "delta.safetensors").exists()
