import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    assert row.difference == 100 and row.p_value == right_answers.compared(none, ones)["p_value"]


def test_a_tie_is_what_mcnemars_test_calls_one():
    """Five images against none have p = 0.0625, although the interval leaves out zero; six have p = 0.03."""
    none = torch.zeros(100, dtype=torch.bool)
    more = {n: torch.arange(100) < n for n in (5, 6)}
    table = right_answers.pairs({"none": none, "five": more[5], "six": more[6]}, [("none", "five"), ("none", "six")])
    assert table.p_value.tolist() == pytest.approx([2 * 0.5**5, 2 * 0.5**6]) and (table.lowest > 0).all()
    assert table.tie.tolist() == [True, False]


def test_methods_are_compared_over_their_seeds():
    """With one seed, as two networks are, but for the test; with several, the mean of the seeds' differences, known better."""
    generator = torch.Generator().manual_seed(0)
    difficulty = torch.rand(2000, generator=generator)
    first, second = ([torch.rand(2000, generator=generator) > level * difficulty for _ in range(3)] for level in (1.0, 0.95))
    alone = [right_answers.compared(*networks) for networks in zip(first, second, strict=True)]
    shares = right_answers.compared(first[0].double(), second[0].double())
    assert [shares[name] for name in ("difference", "lowest", "highest")] == [
        alone[0][name] for name in ("difference", "lowest", "highest")
    ]
    assert shares["p_value"] == pytest.approx(alone[0]["p_value"], rel=0.2)
    over_seeds = right_answers.compared(right_answers.share_right(first), right_answers.share_right(second))
    assert over_seeds["difference"] == pytest.approx(sum(seed["difference"] for seed in alone) / 3)
    assert all(over_seeds["highest"] - over_seeds["lowest"] < 0.8 * (seed["highest"] - seed["lowest"]) for seed in alone)
    assert (over_seeds["p_value"] > 0.05) == (over_seeds["lowest"] <= 0 <= over_seeds["highest"])
    same, all_right = right_answers.share_right(first), torch.ones(2000)
    assert right_answers.compared(same, same)["p_value"] == 1 and right_answers.compared(0 * all_right, all_right)["p_value"] == 0


def test_two_networks_are_compared_image_by_image():
    """McNemar's own kind of table: 30 images only the second gets right, 10 only the first, of 200."""
    first, second = torch.ones(200, dtype=torch.bool), torch.ones(200, dtype=torch.bool)
    first[10:40], second[:10] = False, False
    found = right_answers.compared(first, second)
    exact = 2 * sum(math.comb(40, k) for k in range(11)) / 2**40
    assert found["difference"] == pytest.approx(10) and found["p_value"] == pytest.approx(exact)
    assert found["highest"] - 10 == pytest.approx(10 - found["lowest"]) and 3.9 < found["lowest"] < 4.1
    mirrored = right_answers.compared(second, first)
    assert mirrored["difference"] == -found["difference"] and mirrored["p_value"] == found["p_value"]
    same = right_answers.compared(first, first)
    assert same == {"difference": 0, "lowest": 0, "highest": 0, "p_value": 1}
