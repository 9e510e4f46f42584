"""Which output of a model stands for which class."""
from timm.data import ImageNetInfo, infer_imagenet_subset

from utils import UserError


def class_names(num_outputs: int, trained_on: list[str] | None) -> list[str] | None:
    """Names of the (first) outputs: those kept in the checkpoint, else ImageNet's synsets where the number is that of an ImageNet, else None."""
    if trained_on:
        return trained_on if len(trained_on) <= num_outputs else None
    subset = infer_imagenet_subset({"num_classes": num_outputs})
    return ImageNetInfo(subset).label_names() if subset else None


def output_indices(classes: list[str], num_outputs: int, trained_on: list[str] | None, is_tree: bool) -> tuple[list[int], str]:
    """Output of the model for each class of the data, matched by name, else by position; and a note for the log.

    Raises: UserError if the data have classes that the model has no output for.
    """
    names = class_names(num_outputs, trained_on)
    if names and set(classes) <= set(names):
        place = {name: index for index, name in enumerate(names)}
        note = "" if len(classes) == num_outputs else f"the data have {len(classes)} of the model's {num_outputs} classes"
        return [place[name] for name in classes], note
    if len(classes) == num_outputs:
        return list(range(num_outputs)), f"the checkpoint was trained on other classes ({', '.join(trained_on[:3])}, ...)" if trained_on else ""
    if len(classes) < num_outputs and is_tree and not trained_on:
        return list(range(len(classes))), (f"the model has {num_outputs} outputs and the data {len(classes)} classes, whose names say nothing about them: "
                                           "counted as the first outputs, in alphabetical order")
    raise UserError(f"the model has {num_outputs} outputs, the data {len(classes)} classes ({', '.join(classes[:3])}, ...): they are not those it was "
                    "trained on; the data are chosen by --data-set and --data-path")
