import pytest
from timm.data import ImageNetInfo

from labels import output_indices
from utils import UserError

SYNSETS = ImageNetInfo("imagenet-1k").label_names()


@pytest.mark.parametrize(
    "classes, outputs, trained_on, is_tree, indices, note",
    [
        (["b", "a"], 3, ["a", "b", "c"], True, [1, 0], "2 of the model's 3 classes"),
        (["a", "b"], 2, ["a", "b"], False, [0, 1], ""),
        (["b", "a"], 5, ["a", "b"], True, [1, 0], "2 of the model's 5"),
        (SYNSETS, 1000, None, True, list(range(1000)), ""),
        ([SYNSETS[7], SYNSETS[3]], 1000, None, True, [7, 3], "2 of the model's 1000"),
        (["x", "y"], 2, ["a", "b"], False, [0, 1], "trained on other classes"),
        (["x", "y"], 1000, None, True, [0, 1], "counted as the first outputs, in alphabetical order"),
        (["x", "y"], 2, None, False, [0, 1], "counted as the first"),
    ],
)
def test_outputs_of_classes(classes, outputs, trained_on, is_tree, indices, note):
    found, message = output_indices(classes, outputs, trained_on, is_tree)
    assert found == indices and (note in message if note else message == "")


@pytest.mark.parametrize(
    "classes, outputs, trained_on, is_tree",
    [
        (["x"], 1000, None, False),
        (["x", "y", "z"], 2, None, True),
        (["x"], 2, ["a", "b"], True),
        (["aaa", *SYNSETS[1:]], 1000, None, True),
        (["a", "b", "x"], 3, ["a", "b", "c"], True),
    ],
)
def test_classes_without_an_output(classes, outputs, trained_on, is_tree):
    with pytest.raises(UserError, match="the model has"):
        output_indices(classes, outputs, trained_on, is_tree)
