"""WS-DINO for Hugging Face: the ground floor, what every room of the project may use."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("wsdino")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"
