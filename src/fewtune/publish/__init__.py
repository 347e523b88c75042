"""Runs for other people: `push` puts a task file and its model card on the Hugging Face hub."""

from fewtune.publish.push import Published, push

__all__ = ["Published", "push"]
