"""The size of a micro-batch follows what fits into a step."""

from p2ptrain.training.batches import fitting_batch_size


def test_micro_batch_is_halved_while_nothing_of_it_counts_and_never_less_than_one_sample() -> None:
    size, sizes = 8, []
    for _ in range(5):
        size = fitting_batch_size(size, 0, 8)
        sizes.append(size)
    assert sizes == [4, 2, 1, 1, 1]


def test_micro_batch_grows_again_up_to_what_is_configured_when_several_fit_into_a_step() -> None:
    assert fitting_batch_size(2, 8, 8) == 4
    assert fitting_batch_size(4, 16, 6) == 6
    assert fitting_batch_size(8, 800, 8) == 8


def test_micro_batch_stays_when_one_to_three_fit_into_a_step() -> None:
    assert [fitting_batch_size(4, brought, 8) for brought in (4, 8, 12)] == [4, 4, 4]
