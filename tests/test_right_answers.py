import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_pruning import evaluation
from resnet_pruning.studies import right_answers


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_answers_come_back(answers):
    right = torch.tensor(answers)
    assert torch.equal(right_answers.unpacked(right_answers.packed(right), len(right)), right)


def test_another_length_is_refused():
    with pytest.raises(ValueError, match="the text holds 8 images, expected 100"):
        right_answers.unpacked(right_answers.packed(torch.ones(5, dtype=torch.bool)), 100)


def test_pairs_are_all_or_those_chosen():
    ones, none = torch.ones(40, dtype=torch.bool), torch.zeros(40, dtype=torch.bool)
    nearly = ones.clone()
    nearly[0] = False
    answers = {"a": ones, "b": nearly, "c": none}
    table = right_answers.pairs(answers)
    assert list(zip(table["first"], table["second"], strict=True)) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert table.tie.tolist() == [True, False, False] and table.difference.tolist() == pytest.approx([-2.5, -100, -97.5])
    (row,) = right_answers.pairs(answers, [("c", "a")]).itertuples()
    assert row.difference == 100 and row.p_value == evaluation.compared(none, ones)["p_value"]
