"""Organizations, products, cohorts, devices, members, API keys and gateways."""
