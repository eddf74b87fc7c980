"""The version. pyproject.toml reads it here, so the package's metadata have the same."""

__version__ = "0.3.0"
