"""The device edge: terminates mutual TLS, resolves, publishes check-ins and hands out downloads. It owns nothing."""
