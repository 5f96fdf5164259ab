"""The ``swell`` command."""
