import hashlib

import numpy as np
import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import seeds


def test_a_random_stream_repeats_and_leaves_the_outside_alone():
    torch.manual_seed(1)
    outside = torch.rand(4)
    torch.manual_seed(1)
    with seeds.rng("cpu", 0, "noise", 3):
        inside = torch.rand(4)
    assert torch.equal(torch.rand(4), outside)
    with seeds.rng("cpu", 0, "noise", 3):
        assert torch.equal(torch.rand(4), inside)


def test_random_streams_differ_by_seed_and_by_name():
    named = {seeds.derive(s, n, i) for s in range(3) for n in ("noise", "batches") for i in range(3)}
    assert len(named) == 18
    assert seeds.derive(1, 23) != seeds.derive(12, 3)
    assert torch.rand(1, generator=seeds.generator("cpu", 0, "a")) == torch.rand(
        1, generator=seeds.generator("cpu", 0, "a")
    )


def test_draws_follow_all_624_words_of_the_key():
    """NumPy's Mersenne Twister, given the words that SHAKE-256 makes of the key, draws what ours draws."""
    generator, words = seeds.generator("cpu", 7, "noise", 3), hashlib.shake_256(b"7/noise/3").digest(4 * 624)
    twister = np.random.MT19937()
    twister.state = {
        "bit_generator": "MT19937",
        "state": {"key": np.frombuffer(words, "<u4").astype(np.uint32), "pos": 624},
    }
    drawn = torch.empty(2000, dtype=torch.int64).random_(0, 2**24, generator=generator)  # the low bits of a draw
    assert drawn.tolist() == [int(word) % 2**24 for word in twister.random_raw(2000)]


def test_random_streams_that_agreed_in_32_bits_are_others():
    """Among 200,000 streams, a tenth of a paper-length study's, torch's own seeding had these pairs equal."""
    by_low_bits, pairs = {}, []
    for epoch in range(200_000):
        before = by_low_bits.setdefault(seeds.derive(0, "noise", epoch) % 2**32, epoch)
        pairs += [(before, epoch)] if before != epoch else []
    assert pairs
    for pair in pairs:
        torch_own = [torch.Generator().manual_seed(seeds.derive(0, "noise", epoch)) for epoch in pair]
        ours = [seeds.generator("cpu", 0, "noise", epoch) for epoch in pair]
        assert torch.equal(*(torch.rand(8, generator=g) for g in torch_own))
        assert not torch.equal(*(torch.rand(8, generator=g) for g in ours))


def test_two_seeds_that_gave_one_network_give_two():
    nets = []
    for seed in (29168, 43999):
        assert seeds.derive(seed, "init") % 2**32 == seeds.derive(29168, "init") % 2**32
        with seeds.rng("cpu", seed, "init"):
            nets.append(pl.create_model("lenet"))
    assert not any(torch.equal(a, b) for a, b in zip(*(net.parameters() for net in nets), strict=True) if a.ndim > 1)


def test_a_state_goes_on_where_it_was():
    generator, other = seeds.generator("cpu", 1, "order"), torch.Generator()
    torch.randn(5, generator=generator)
    other.set_state(generator.get_state())
    assert torch.equal(torch.randn(700, generator=generator), torch.randn(700, generator=other))


def test_deterministic_algorithms_are_asked_for_inside_alone():
    def switches():
        deterministic, cudnn = torch.utils.deterministic, torch.backends.cudnn
        return torch.are_deterministic_algorithms_enabled(), cudnn.benchmark, deterministic.fill_uninitialized_memory

    before = switches()
    with seeds.algorithms(deterministic=True):
        assert switches() == (True, False, False)
    assert switches() == before
    with seeds.algorithms(deterministic=False):
        assert switches() == (False, True, True)  # cuDNN measures its algorithms
    assert switches() == before
    with pytest.raises(pl.UserError, match="--deterministic: put_ does not"), seeds.algorithms(deterministic=True):
        raise RuntimeError("put_ does not have a deterministic implementation\nmore")
    with pytest.raises(RuntimeError, match="other"), seeds.algorithms(deterministic=True):
        raise RuntimeError("other")
