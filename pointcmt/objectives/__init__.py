"""One objective per file: what a student can be taught to do by an image teacher."""

from pointcmt.objectives.base import Objective, Sizes
from pointcmt.objectives.classifier_enhancement import ClassifierEnhancement
from pointcmt.objectives.decoupled_soft_labels import DecoupledSoftLabels
from pointcmt.objectives.feature_enhancement import FeatureEnhancement
from pointcmt.objectives.feature_l2 import FeatureL2
from pointcmt.objectives.image_labels import ImageLabels
from pointcmt.objectives.info_nce import GlobalInfoNCE, IntraModalInfoNCE, MultiViewInfoNCE, info_nce
from pointcmt.objectives.local_info_nce import LocalInfoNCE, local_info_nce
from pointcmt.objectives.nst import NeuronSelectivityTransfer
from pointcmt.objectives.nt_xent import CrossModalNTXent, IntraModalNTXent, nt_xent
from pointcmt.objectives.pixel_features import PixelFeatures
from pointcmt.objectives.projected_l2 import ProjectedL2
from pointcmt.objectives.relational import RelationalDistillation
from pointcmt.objectives.scaled_classifier_enhancement import ScaledClassifierEnhancement
from pointcmt.objectives.soft_labels import SoftLabels
from pointcmt.objectives.srrl import SoftmaxRegression
from pointcmt.objectives.standardised_soft_labels import StandardisedSoftLabels

__all__ = [
    "ClassifierEnhancement",
    "CrossModalNTXent",
    "DecoupledSoftLabels",
    "FeatureEnhancement",
    "FeatureL2",
    "GlobalInfoNCE",
    "ImageLabels",
    "IntraModalInfoNCE",
    "IntraModalNTXent",
    "LocalInfoNCE",
    "MultiViewInfoNCE",
    "NeuronSelectivityTransfer",
    "Objective",
    "PixelFeatures",
    "ProjectedL2",
    "RelationalDistillation",
    "ScaledClassifierEnhancement",
    "Sizes",
    "SoftLabels",
    "SoftmaxRegression",
    "StandardisedSoftLabels",
    "info_nce",
    "local_info_nce",
    "nt_xent",
]
