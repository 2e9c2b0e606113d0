"""What a model says about its weights, for `methods.interop`; each attribute may be missing.

* `weight_options`, of any module: options that change the result but no tensor, with their values as text.
* `weights_without`, of the model: beginnings of names that published files have and this model does without.
* `options_left_open`, of the model: names of `weight_options` that follow from a rule because the user gave no value;
  a file that needs to be told such a value is then refused.
* `classifier_columns`, of the model: `ClassifierColumns`, where two pathways meet in the classifier.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClassifierColumns:
    """Which input columns of the classifier are of which pathway.

    Attributes:
        slow_first: they are [slow, fast], else [fast, slow].
        fast: columns of the Fast pathway.
    """

    slow_first: bool
    fast: int
