"""fewtune: fine-tune pretrained vision models by changing only a few of their weights."""
