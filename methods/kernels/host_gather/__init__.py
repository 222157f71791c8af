"""Chunks of the host mirror into slots on the device, through one of three backends."""
