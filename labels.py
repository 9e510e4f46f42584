"""Classes of the outputs of a model."""

from timm.data import ImageNetInfo, infer_imagenet_subset

from utils import UserError


def class_names(num_outputs: int, trained_on: list[str] | None) -> list[str] | None:
    """Names of the first outputs: the checkpoint's classes, else the synsets of an ImageNet of this size, else None."""
    if trained_on:
        return trained_on if len(trained_on) <= num_outputs else None
    subset = infer_imagenet_subset({"num_classes": num_outputs})
    return ImageNetInfo(subset).label_names() if subset else None


def output_indices(
    classes: list[str], num_outputs: int, trained_on: list[str] | None, is_tree: bool
) -> tuple[list[int], str]:
    """Output of the model for each class of the data, matched by name, else by position; and a note for the log.

    Raises: UserError if the model has no output for a class of the data.
    """
    names = class_names(num_outputs, trained_on)
    unknown = sorted(set(classes) - set(names or []))
    if names and not unknown:
        place = {name: index for index, name in enumerate(names)}
        note = f"the data have {len(classes)} of the model's {num_outputs} classes"
        return [place[name] for name in classes], "" if len(classes) == num_outputs else note
    if names and len(unknown) < len(classes) / 2:
        raise UserError(
            f"the model has no output for class {', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}, "
            "although it has one for the other classes of the data"
        )
    if len(classes) == num_outputs or (len(classes) < num_outputs and is_tree and not trained_on):
        note = (
            f"the classes of the outputs are unknown: the {len(classes)} classes of the data are counted as the first "
            f"outputs{', in alphabetical order' if is_tree else ''}"
        )
        if trained_on:
            note = f"the checkpoint was trained on other classes ({', '.join(trained_on[:3])}, ...)"
        return list(range(len(classes))), note
    raise UserError(
        f"the model has {num_outputs} outputs, the data {len(classes)} classes ({', '.join(classes[:3])}, ...), which "
        "are not the classes of its training: choose other data with --data-set and --data-path"
    )
