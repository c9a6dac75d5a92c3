"""A policy over the network: server, client, and the messages between them."""
