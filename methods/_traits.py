"""Describe the weights of a model for `methods.interop`; each attribute may be missing.

* `weight_options`, on any module: options that change the result but no tensor, with their values as text.
* `weights_without`, on the model: prefixes of names that published files have and this model does not need.
* `options_left_open`, on the model: names of `weight_options` that follow from a rule because the user gave no value.
  If a file cannot be read without such a value, it is refused.
* `classifier_columns`, on the model: `ClassifierColumns`, if two pathways meet in the classifier.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClassifierColumns:
    """Assign the input columns of the classifier to the two pathways.

    Attributes:
        slow_first: the order is [slow, fast]; otherwise [fast, slow].
        fast: number of columns of the Fast pathway.
    """

    slow_first: bool
    fast: int
