"""Face recognizers that a bundle can be exported with.

iresnet             ArcFace's residual networks, 18 to 200 layers
inception_resnet    InceptionResnetV1 (FaceNet)
mobilefacenet       MobileFaceNet
onnx_import         anything else, from an ONNX file
ensemble            several recognizers as one
families            which state dict is which
preprocessing       channel order, range of values and size of a network's input
loader              files to recognizers: `load_recognizer`

IR-SE50 is `diffveil_export.models.irse50`.
"""

from __future__ import annotations

from diffveil_export.models.recognizers.ensemble import RecognizerEnsemble
from diffveil_export.models.recognizers.families import FAMILIES
from diffveil_export.models.recognizers.inception_resnet import InceptionResnetV1
from diffveil_export.models.recognizers.iresnet import IResNet
from diffveil_export.models.recognizers.loader import LoadedRecognizer, load_recognizer
from diffveil_export.models.recognizers.mobilefacenet import MobileFaceNet
from diffveil_export.models.recognizers.preprocessing import INPUT_FORMATS, FacePreprocessing

__all__ = [
    "FAMILIES",
    "INPUT_FORMATS",
    "FacePreprocessing",
    "IResNet",
    "InceptionResnetV1",
    "LoadedRecognizer",
    "MobileFaceNet",
    "RecognizerEnsemble",
    "load_recognizer",
]
