"""How many nodes, and how long before averaging? Many trainings, in one process each, through the swarm's own
maths; and what they add up to. No swarm is needed."""
