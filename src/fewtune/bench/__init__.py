"""The bench: a grid of runs under one protocol, and tables of what came out beside the paper's.

For every task and method the choices of the grid are tried on validation images alone; with the best of them the
method is trained again on training and validation images, the last epoch is taken, and the test set is read once.
"""
