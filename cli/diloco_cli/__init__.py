"""The commands diloco-server and diloco-client: click only, no work of their own."""
