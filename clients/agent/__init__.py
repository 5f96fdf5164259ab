"""The reference agent: `python -m clients.agent --config FILE`. Its rules are `clients.device.machine`.

Configuration (JSON; paths are relative to the file):

    gateway             "127.0.0.1:19443", where to connect
    server_name         "acme.devices.localhost", sent as SNI and checked against the gateway's certificate
    ca_file             PEM of the CA that the gateway's certificate must come from
    certificate, key    PEM of the device's own (certificate with its chain)
    state_directory     everything that must survive
    product             "organizations/acme/products/thermostat", the only product whose bundles are installed
    target              hardware target; `portable` binaries fit as well
    trusted_keys        list of raw Ed25519 public keys in hex, threshold: how many of them must have signed
    factory             {"version": "1.0.0", "security_version": 0}
    attributes          optional, sent with every check-in
    serial              optional, written to <state_directory>/serial for the firmware
    poll_s              optional, overrides the poll time of the server
    log                 optional file; else standard error
    boot_timeout_s 30, health_timeout_s 10, trial_timeout_s 600, download_timeout_s 3600, floor_rate_bytes_s 1024,
    rate_window_s 30, max_bundle_bytes 1 GiB, min_free_bytes 1 MiB, object_store_ca: optional

The certificate named here is the factory's. The agent renews it at two thirds of its life, over EST at the gateway,
with a key of its own under <state_directory>/identity, where it finds it again at its next start.

The firmware's contract. A slot holds an executable `run`; it is called with its slot as working directory and argument:
`run --boot SLOT` starts it (status 0: booted) and `run --health SLOT` is its own verdict (status 0: healthy); the
first line of standard output says why not. `GROUNDSWELL_STATE` names the state directory (with the file `serial`),
`GROUNDSWELL_DATA` a directory of the slot's own that lives as long as its content. A call that takes longer than its
time-out is killed with all it started, and counts as failed. Factory firmware outside the slots is taken to be well.
"""
