"""One torch thread in every test: the bits are those of a run, and two cores are not fought over."""

import gc

gc.disable()  # what is imported and collected stays: a third of that time went into looking for garbage in it

import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Every test is there: from here on garbage is collected as ever, but not among all this."""
    gc.freeze()
    gc.enable()
