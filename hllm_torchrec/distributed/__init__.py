"""Process group, rendezvous, collectives, coordination of ranks, preemption."""
