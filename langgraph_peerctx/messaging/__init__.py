"""Carrying messages over Kafka, and the peer that answers."""
