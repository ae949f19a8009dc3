"""The prompt cursor: epochs are permutations, and a restored cursor goes on where the saved one stopped."""

import pytest

from r1mega.data.cursor import PromptCursor


def test_each_epoch_is_another_permutation():
    cursor = PromptCursor(7, seed=3)
    epochs = [cursor.draw(7) for _ in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("cut", [0, 3, 7, 12])
def test_restored_cursor_continues(cut):
    whole = PromptCursor(7, seed=1).draw(20)
    first = PromptCursor(7, seed=1)
    head = first.draw(cut)
    second = PromptCursor(7, seed=1)
    second.load_state_dict(first.state_dict())
    assert head + second.draw(20 - cut) == whole


def test_state_of_other_data_is_refused():
    with pytest.raises(ValueError, match="7 items"):
        PromptCursor(8, seed=1).load_state_dict(PromptCursor(7, seed=1).state_dict())
