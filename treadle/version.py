"""The version, in one place: pyproject.toml, `treadle --version`, `treadle.__version__` and the records of runs read it here."""

__version__ = "0.1.0"
