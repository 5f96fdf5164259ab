"""Signing keys, artifacts, binaries with their uploads, and signed bundles."""
