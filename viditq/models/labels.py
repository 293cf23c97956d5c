"""Class-conditional models: a prompt is the name of a class, as the pipeline has it, or its number."""

import difflib

from viditq.errors import UserError
from viditq.models.adapter import ModelAdapter


def class_label(adapter: ModelAdapter, prompt: str) -> int:
    """The number of the class that `prompt` names; raises UserError if the model has no such class."""
    names = class_names(adapter)
    if prompt.strip().isdecimal():
        label = int(prompt)
        if names and label not in names.values():
            raise UserError(
                f"{adapter.name} has no class {label}; its classes are {min(names.values())} to {max(names.values())}."
            )
        return label
    if prompt not in names:
        close = ", ".join(difflib.get_close_matches(prompt, names, n=3, cutoff=0)) or "none"
        raise UserError(
            f"The prompt {prompt[:60]!r} is no class of {adapter.name}; close names are: {close}. Numbers work too."
        )
    return names[prompt]


def class_names(adapter: ModelAdapter) -> dict[str, int]:
    """Class name -> number, from model_index.json (`id2label`: synonyms are divided by commas)."""
    return {
        name.strip(): int(number)
        for number, names in adapter.index().get("id2label", {}).items()
        for name in names.split(",")
    }
