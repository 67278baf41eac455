"""What is known of megatron-core versions."""

from __future__ import annotations

from importlib import metadata

# The release the tests run against.
TESTED = ("0.19",)


def installed_version() -> str:
    """Return the version of the installed megatron-core, or "(not installed)"."""
    try:
        return metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        return "(not installed)"
