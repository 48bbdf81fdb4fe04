"""Sparkplug B encoder and the MQTT publisher that carries the outbox to the hub."""
