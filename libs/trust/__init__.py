"""What is signed and by whom: canonical JSON, bundle statements, detached signatures.

Standard library and ``cryptography``'s Ed25519 only, because the device agent imports it. ``vectors.json`` holds test
vectors for whoever writes another signer or agent: keys, statements, digests, signatures, and forms to be refused.
"""
