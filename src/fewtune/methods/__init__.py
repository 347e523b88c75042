"""The methods to compare with: each says what of a model is trained, and how where that is its own way."""
