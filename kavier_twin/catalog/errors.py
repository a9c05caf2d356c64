"""The one error of this room."""


class CatalogError(ValueError):
    """A GPU or model that cannot be read or found: the message names it, what is known, and the fix."""
