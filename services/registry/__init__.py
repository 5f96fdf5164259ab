"""The registry: organizations, products, cohorts, devices, members, API keys and gateways."""
