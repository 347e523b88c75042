"""Limits of a service."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes and pixels, times in seconds."""

    batch: int = 16
    """Images of one forward pass."""
    wait: float = 0.005
    """How long the oldest image waits for others to share its pass."""
    queue: int = 64
    """Images that may wait; more are answered 503."""
    body: int = 20 * 2**20
    """Of a request."""
    pixels: int = 50_000_000
    """Of an image."""
    receive: float = 30.0
    """Until the whole body of a request is there."""
    tasks: int = 10_000
    """Task files held at once."""
