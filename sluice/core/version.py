"""The version of the package, and how its parts are installed."""

__all__ = ["INSTALL_TORCH", "__version__"]

__version__ = "0.1.0"
INSTALL_TORCH = "install it with 'pip install torch-sluice[torch]'"
