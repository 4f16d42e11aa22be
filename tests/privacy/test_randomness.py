"""The key stream, and the noise made of it."""

import copy
import os
import pickle

import numpy as np
import pytest

from consortium.privacy.randomness import Stream, Vector


def test_noise_is_standard_normal() -> None:
    """Mean, deviation, kurtosis and tails of a million numbers, and no correlation within a pair."""
    numbers = Stream.seeded("normal").gaussians(1_000_000)
    assert abs(numbers.mean()) < 5e-3
    assert numbers.std() == pytest.approx(1, abs=5e-3)
    assert (numbers**4).mean() == pytest.approx(3, abs=0.05)
    assert (np.abs(numbers) > 1.96).mean() == pytest.approx(0.05, abs=2e-3)
    half = 4096
    for start in (0, 2 * half):
        pair = np.corrcoef(numbers[start : start + half], numbers[start + half : start + 2 * half])[0, 1]
        assert abs(pair) < 0.07


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4095, 8192, 8193, 20_001])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_number_of_a_vector_is_noised_by_itself(size: int, dtype: type) -> None:
    """Whatever its length: none is left out, none is used twice; zero deviation changes nothing."""
    vector: Vector = np.zeros(size, dtype)
    Stream.seeded(size).add_gaussian(vector, 2.0)
    assert len(np.unique(vector)) >= 0.999 * size  # in float32 some are equal by chance
    assert not (vector == 0).any()
    if size > 4000:
        assert vector.std() == pytest.approx(2, rel=0.05)
    before = vector.copy()
    Stream.system().add_gaussian(vector, 0.0)
    np.testing.assert_array_equal(vector, before)


def test_noise_of_deployment_never_repeats_and_noise_of_simulation_does() -> None:
    """Two streams of the system differ; two of one seed are equal, two of different seeds are not."""
    assert not np.array_equal(Stream.system().gaussians(8), Stream.system().gaussians(8))
    one, same, other = (Stream.seeded(7, site).gaussians(8) for site in ("a", "a", "b"))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    stream = Stream.system()
    assert not np.array_equal(stream.gaussians(8), stream.gaussians(8))


def test_numpys_and_pythons_seeds_do_not_touch_it() -> None:
    """Seeding every other generator makes no stream of the system repeat itself."""
    import random

    drawn = []
    for _ in range(2):
        np.random.seed(0)  # noqa: NPY002 - that it has no effect is the point
        random.seed(0)
        drawn.append(Stream.system().uniforms(4))
    assert not np.array_equal(drawn[0], drawn[1])


def test_a_forked_process_has_a_stream_of_its_own() -> None:
    """Parent and child draw different numbers from what was one stream."""
    stream = Stream.system()
    stream.bits(1)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, stream.bits(4).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 64) != stream.bits(4).tobytes()
    os.close(read)
    os.close(write)


def test_a_stream_is_not_copied() -> None:
    """Neither pickled nor copied: both would noise with the same numbers."""
    with pytest.raises(TypeError, match="not copied"):
        pickle.dumps(Stream.system())
    with pytest.raises(TypeError, match="not copied"):
        copy.copy(Stream.system())


def test_a_poisson_sample_has_each_unit_with_its_rate() -> None:
    """Independently: the size varies as a binomial's does, and each index comes as often as any other."""
    stream = Stream.seeded("poisson")
    counts = np.zeros(200)
    sizes = []
    for _ in range(2000):
        chosen = stream.chosen(200, 0.1)
        counts[chosen] += 1
        sizes.append(len(chosen))
    assert np.mean(sizes) == pytest.approx(20, rel=0.02)
    assert np.var(sizes) == pytest.approx(18, rel=0.15)
    assert counts.min() > 140
    assert counts.max() < 270
    assert list(stream.chosen(5, 1.0)) == [0, 1, 2, 3, 4]
    assert not len(stream.chosen(0, 0.5))


def test_uniform_numbers_are_uniform() -> None:
    """In [0, 1), all 53 bits in use."""
    numbers = Stream.seeded("uniform").uniforms(200_000)
    assert 0 <= numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    assert numbers.mean() == pytest.approx(0.5, abs=3e-3)
    assert ((numbers * 2.0**53).astype(np.uint64) & np.uint64(1)).mean() == pytest.approx(0.5, abs=0.01)
