"""Which output of a model stands for which class."""

from timm.data import ImageNetInfo, infer_imagenet_subset

from utils import UserError


def class_names(num_outputs: int, trained_on: list[str] | None) -> list[str] | None:
    """Names of the (first) outputs: those kept in the checkpoint, else ImageNet's synsets where the number is that of an ImageNet, else None."""
    if trained_on:
        return trained_on if len(trained_on) <= num_outputs else None
    subset = infer_imagenet_subset({"num_classes": num_outputs})
    return ImageNetInfo(subset).label_names() if subset else None


def output_indices(
    classes: list[str], num_outputs: int, trained_on: list[str] | None, is_tree: bool
) -> tuple[list[int], str]:
    """Output of the model for each class of the data, matched by name, else by position; and a note for the log.

    Raises: UserError if the data have classes that the model has no output for.
    """
    names = class_names(num_outputs, trained_on)
    unknown = sorted(set(classes) - set(names or []))
    if names and not unknown:
        place = {name: index for index, name in enumerate(names)}
        note = (
            "" if len(classes) == num_outputs else f"the data have {len(classes)} of the model's {num_outputs} classes"
        )
        return [place[name] for name in classes], note
    if names and len(unknown) < len(classes) / 2:
        raise UserError(
            f"the model has no output for {', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}, but for the other classes of the data"
        )
    if len(classes) == num_outputs and trained_on:
        return list(
            range(num_outputs)
        ), f"the checkpoint was trained on other classes ({', '.join(trained_on[:3])}, ...)"
    if len(classes) == num_outputs or (len(classes) < num_outputs and is_tree and not trained_on):
        order = ", in alphabetical order" if is_tree else ""
        return (
            list(range(len(classes))),
            f"nothing says which output is which class: the {len(classes)} classes of the data are counted as the first outputs{order}",
        )
    raise UserError(
        f"the model has {num_outputs} outputs, the data {len(classes)} classes ({', '.join(classes[:3])}, ...): they are not those it was "
        "trained on; the data are chosen by --data-set and --data-path"
    )
