"""Request records and OpenTelemetry spans from Apache Kafka. Needs the extra `kafka`; spans as protobuf also `otlp`."""
