"""The release graph of each cohort, bundle overrides, and dry runs."""
