import numpy as np


def chance(weights, inputs):
    return 1 / (1 + np.exp(-inputs @ weights))


def gradient(weights, inputs, targets):
    return inputs.T @ (chance(weights, inputs) - targets) / len(targets)
