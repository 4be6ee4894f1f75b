"""The model room: what ships to the Hub beside every checkpoint, and how such repositories are built."""

from importlib.metadata import PackageNotFoundError, requires

from transformers.utils.versions import require_version


def check_requirements() -> None:
    """Name the first dependency that is missing or older than the installed package asks for.

    Raises:
        ImportError: with the version that is there, the one that is needed, and the command that installs it.
    """
    try:
        requirements = requires("wsdino") or []
    except PackageNotFoundError:  # a checkout that was not installed promises nothing
        return
    for requirement in requirements:
        if "extra ==" not in requirement:
            require_version(requirement, f"Try: pip install '{requirement}'")


# Here and not in the commands: what is too old fails, in words that do not name it, while the next lines are imported.
check_requirements()

from .build_repository import build_combined_repository, build_repository  # noqa: E402
from .configuration_wsdino import WSDinoConfig  # noqa: E402
from .image_processing_wsdino import WSDinoImageProcessor  # noqa: E402
from .modeling_wsdino import WSDinoModel, WSDinoMultiChannelModel, attention_mass_mask  # noqa: E402
from .pipeline_wsdino import WSDinoFeatureExtractionPipeline  # noqa: E402

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
