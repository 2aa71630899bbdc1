"""The version of Manta, which every run folder holds beside its configuration. pyproject.toml reads it from here."""

VERSION = "0.2.0"
