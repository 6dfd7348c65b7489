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


def drawn(generator, accuracies, difficulty):
    """The answers of a method: a row for each seed, of about the given accuracy, and wrong more often where an image is difficult."""
    return torch.stack([torch.rand(len(difficulty), generator=generator) > 2 * (1 - accuracy) * difficulty for accuracy in accuracies])


def test_methods_are_compared_over_their_seeds():
    """With one seed, as two networks are, but for the test; with several, the mean of the seeds' differences, known better."""
    generator = torch.Generator().manual_seed(0)
    difficulty = torch.rand(2000, generator=generator)
    first, second = (drawn(generator, [accuracy] * 3, difficulty) for accuracy in (0.5, 0.55))
    alone = [right_answers.compared(*networks) for networks in zip(first, second, strict=True)]
    one_seed = right_answers.compared(first[:1], second[:1])
    assert [one_seed[name] for name in ("difference", "lowest")] == pytest.approx(
        [alone[0][name] for name in ("difference", "lowest")], rel=1e-3
    )
    assert one_seed["p_value"] == pytest.approx(alone[0]["p_value"], rel=0.5)
    over_seeds = right_answers.compared(first, second)
    assert over_seeds["difference"] == pytest.approx(sum(seed["difference"] for seed in alone) / 3)
    assert (over_seeds["p_value"] > 0.05) == (over_seeds["lowest"] <= 0 <= over_seeds["highest"])
    same, all_right = first[:1], torch.ones(3, 2000, dtype=torch.bool)
    assert right_answers.compared(same, same)["p_value"] == 1 and right_answers.compared(~all_right, all_right)["p_value"] == 0
    assert right_answers.compared(first, second[0])["difference"] == pytest.approx(
        100 * (second[0].double().mean() - first.double().mean()).item()
    )


@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_intervals_hold_for_other_images_and_other_seeds(spread):
    """Of 300 pairs of equally good methods, at most about one in twenty is called different, also where seeds differ in accuracy."""
    generator = torch.Generator().manual_seed(1)
    called_different, by_images_alone = 0, 0
    for _ in range(300):
        difficulty = torch.rand(400, generator=generator)
        first, second = (drawn(generator, (0.8 + spread * torch.randn(3, generator=generator)).tolist(), difficulty) for _ in range(2))
        found = right_answers.compared(first, second)
        called_different += not found["lowest"] <= 0 <= found["highest"]
        gains = second.double().mean(0) - first.double().mean(0)
        by_images_alone += (abs(gains.mean()) > 1.96 * gains.std() / len(gains) ** 0.5).item()
    assert called_different <= 24
    assert by_images_alone > 90 if spread else 5 < by_images_alone < 27


def test_what_a_change_is_worth_is_a_mean_over_methods_and_known_better():
    generator = torch.Generator().manual_seed(2)
    difficulty = torch.rand(4000, generator=generator)
    pairs = [(drawn(generator, [low] * 3, difficulty), drawn(generator, [low + 0.03] * 3, difficulty)) for low in (0.6, 0.7, 0.8, 0.9)]
    alone, together = [right_answers.compared(*pair) for pair in pairs], right_answers.worth(pairs)
    assert together["difference"] == pytest.approx(sum(each["difference"] for each in alone) / len(alone))
    width = together["highest"] - together["lowest"]
    assert all(width < each["highest"] - each["lowest"] for each in alone) and together["p_value"] < min(each["p_value"] for each in alone)
    mirrored = right_answers.worth([(second, first) for first, second in pairs])
    assert mirrored["lowest"] == pytest.approx(-together["highest"]) and mirrored["p_value"] == pytest.approx(together["p_value"])


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
