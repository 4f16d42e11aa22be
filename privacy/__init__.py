"""Differential privacy: clip, noise, account, ledger. numpy, cryptography and dp-accounting; no torch, no network.

Modules: `accounting` (epsilon from releases), `randomness` (cryptographic noise), `mechanisms` (clip, noise and what
they cost), `ledger` (what a data set has spent). Nothing heavy is imported here.
"""
