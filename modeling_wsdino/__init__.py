"""The model room: what ships to the Hub beside every checkpoint, and how such repositories are built."""

from .build_repository import build_combined_repository, build_repository
from .configuration_wsdino import WSDinoConfig
from .image_processing_wsdino import WSDinoImageProcessor
from .modeling_wsdino import WSDinoModel, WSDinoMultiChannelModel
from .pipeline_wsdino import WSDinoFeatureExtractionPipeline, attention_mass_mask

__all__ = [
    "WSDinoConfig",
    "WSDinoFeatureExtractionPipeline",
    "WSDinoImageProcessor",
    "WSDinoModel",
    "WSDinoMultiChannelModel",
    "attention_mass_mask",
    "build_combined_repository",
    "build_repository",
]
