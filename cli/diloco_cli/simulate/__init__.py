"""A run in virtual time: the server's state machine and any number of workers in one process.

The server side is `diloco_server.run.Run`, the workers' side `diloco_client.replica.Replica` and `Flights`: what real
servers and workers are made of, without their threads, connections and clocks. Everything follows from one seed.
"""
