"""The version of maekit: what run directories and exported files say they were made with."""

__version__ = "0.1.0"
