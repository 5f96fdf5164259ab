"""What the container images run beside the services."""
