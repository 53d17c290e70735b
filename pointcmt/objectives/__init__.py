"""One objective per file: what a student can be taught to do by an image teacher."""

from pointcmt.objectives.base import Objective, Sizes
from pointcmt.objectives.classifier_enhancement import ClassifierEnhancement
from pointcmt.objectives.feature_enhancement import FeatureEnhancement
from pointcmt.objectives.feature_l2 import FeatureL2
from pointcmt.objectives.nst import NeuronSelectivityTransfer
from pointcmt.objectives.soft_labels import SoftLabels
from pointcmt.objectives.srrl import SoftmaxRegression

__all__ = [
    "ClassifierEnhancement",
    "FeatureEnhancement",
    "FeatureL2",
    "NeuronSelectivityTransfer",
    "Objective",
    "Sizes",
    "SoftLabels",
    "SoftmaxRegression",
]
