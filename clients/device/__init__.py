"""The device SDK: everything a Groundswell agent needs, in the standard library and one Ed25519 verifier.

* :mod:`.model` the bodies of the device API, typed, parsed strictly;
* :mod:`.api` check-ins and downloads over mutual TLS;
* :mod:`.download` fetching one binary with resume, caps and a floor rate;
* :mod:`.offers` what makes an offer trustworthy: statement, signatures, product, target, floor;
* :mod:`.machine` the pure state machine of an update;
* :mod:`.state`, :mod:`.counter`, :mod:`.slots` what survives a power cut.
"""
