"""The local stack: real Kafka, Redis and S3 as ordinary processes on loopback, and our services, supervised."""
